//! The seam to routing policies, the native router, and the check that stands between a guest's answer and a replica.
//!
//! Pure data and pure functions: gathering the columns from live replicas is the server's job ([`crate::publish`] is what
//! it reads), calling a guest is the policy crate's.

use std::sync::Arc;

use crate::ids::{Micros, Priority, ReplicaId, RequestId};

/// The request as routers see it; mirrors `record request` of `interface router`.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the fields are those of `record request`, documented there")]
pub struct RouteRequest<'a> {
    pub id: RequestId,
    pub model: &'a str,
    pub tenant: &'a str,
    pub tenant_id: u32,
    pub session: u64,
    pub prefix: u64,
    pub priority: Priority,
    pub prompt_tokens: u32,
    pub max_new_tokens: u32,
    pub arrived: Micros,
    pub deadline: Micros,
    pub seed: u64,
    pub numbers: RequestNumbers,
    /// Texts that a router may ask for by name, such as `header.x-plan`; only those it wants reach it.
    pub attributes: &'a [(&'a str, &'a str)],
}

/// The `request.*` names of docs/columns.md.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestNumbers {
    /// `request.choices`.
    pub choices: u64,
    /// `request.temperature-ppm`.
    pub temperature_ppm: u64,
    /// `request.stream`.
    pub stream: u64,
    /// `request.min-new-tokens`.
    pub min_new_tokens: u64,
    /// `request.cache-prompt`.
    pub cache_prompt: u64,
}

/// Replicas that can serve a request, as columns of one length; mirrors `record replicas`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record replicas`, documented there")]
pub struct ReplicaColumns {
    pub id: Vec<u32>,
    pub key: Vec<u64>,
    pub health: Vec<u8>,
    pub weight: Vec<u32>,
    pub waiting: Vec<u32>,
    pub running: Vec<u32>,
    pub running_limit: Vec<u32>,
    pub queued_tokens: Vec<u32>,
    pub free_blocks: Vec<u32>,
    pub total_blocks: Vec<u32>,
    pub cached_tokens: Vec<u32>,
    /// `replica.device` of docs/columns.md.
    pub device: Vec<u64>,
    /// `replica.variant` of docs/columns.md.
    pub variant: Vec<u64>,
    /// `replica.load`.
    pub load: Vec<u64>,
    /// `replica.errors`.
    pub errors: Vec<u64>,
    /// `replica.age`.
    pub age: Vec<u64>,
    /// `replica.predicted-ttft`.
    pub predicted_ttft: Vec<u64>,
    /// `replica.kind`.
    pub kind: Vec<u64>,
    /// `replica.label.<name>`, in the order in which the host numbers its labels.
    pub labels: Vec<(Arc<str>, Vec<u64>)>,
}

/// What the column `replica.kind` holds for an upstream; 0 for a replica of this host.
pub const UPSTREAM: u64 = 1;

/// What a label column holds where a replica has no such label.
pub const NO_LABEL: u64 = u64::MAX;

/// A router's answer; rows are indices into [`ReplicaColumns`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// No opinion.
    Abstain,
    /// This row.
    Pick(u32),
    /// These rows, best first.
    Rank(Vec<u32>),
    /// Refuse the request.
    Reject(Rejection),
}

/// A policy's refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Why.
    pub reason: Refusal,
    /// When a retry makes sense; 0 for the host's own estimate.
    pub retry_after_ms: u32,
    /// Shown to the client.
    pub message: String,
}

/// Why a policy refuses; 429 but for `NotAllowed` (403).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Too much load.
    Overloaded,
    /// The tenant has used its share.
    Quota,
    /// Never, for this client.
    NotAllowed,
    /// It would end after its deadline.
    CannotMeetDeadline,
}

/// Who decided, for headers, logs and events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecidedBy {
    /// `name@version+digest`, or `native`.
    pub revision: Arc<str>,
    /// Generation of the slot.
    pub generation: u64,
}

/// A router's answer with its author. `decided_by` is the slot's active revision also when the answer is `Abstain`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routed {
    /// The answer, already checked: rows are in range, a rank is not empty and names no row twice.
    pub choice: Choice,
    /// Whose answer it is.
    pub decided_by: DecidedBy,
    /// Why the native policy stands in for a guest; `None` when the guest itself answered, or the slot has none.
    pub fallback: Option<Fallback>,
}

/// Why a guest did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// Its circuit is open after earlier faults.
    CircuitOpen,
    /// Every instance is in use or being replaced.
    NoInstance,
    /// It faulted in this call; the word is the fault's kind.
    Fault(&'static str),
}

/// Chooses the replica that serves a request. Called on any worker thread, several at once; must not block.
pub trait RoutePolicy: Send + Sync + std::fmt::Debug {
    /// Answers for one request. A guest's bad answer never leaves this call: it becomes `Abstain` with `fallback` set.
    fn route(&self, now: Micros, request: &RouteRequest<'_>, replicas: &ReplicaColumns) -> Routed;
}

/// Why a choice is not an answer to these replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChoice {
    /// A row that does not exist.
    #[error("row {row} is out of range: {rows} replicas were offered")]
    OutOfRange {
        /// The row.
        row: u32,
        /// How many there were.
        rows: u32,
    },
    /// A rank without rows.
    #[error("the rank is empty; answer `abstain` to leave the decision to the host")]
    EmptyRank,
    /// A rank that names a row twice, or more rows than there are.
    #[error("row {0} is ranked twice")]
    Duplicate(u32),
}

/// Checks a guest's choice against the number of rows it was shown.
///
/// # Errors
/// The first rule that the choice breaks.
pub fn check_choice(choice: &Choice, n_rows: usize) -> Result<(), BadChoice> {
    let rows = u32::try_from(n_rows).unwrap_or(u32::MAX);
    let in_range = |row: u32| if row < rows { Ok(()) } else { Err(BadChoice::OutOfRange { row, rows }) };
    match choice {
        Choice::Abstain | Choice::Reject(_) => Ok(()),
        Choice::Pick(row) => in_range(*row),
        Choice::Rank(rank) if rank.is_empty() => Err(BadChoice::EmptyRank),
        Choice::Rank(rank) => {
            let mut seen = vec![false; n_rows];
            for &row in rank {
                in_range(row)?;
                if std::mem::replace(&mut seen[row as usize], true) {
                    return Err(BadChoice::Duplicate(row));
                }
            }
            Ok(())
        }
    }
}

/// What a checked choice comes to, given which rows have room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// Send it to this row.
    Row(usize),
    /// No row has room: 429.
    Full,
}

/// Turns a checked choice (not a rejection) into a row: the first preferred row that takes the request, else the native
/// order. `has_room(row)` is true when the replica's mailbox and queue take one more request.
pub fn resolve(choice: &Choice, replicas: &ReplicaColumns, seed: u64, has_room: impl Fn(usize) -> bool) -> Resolved {
    let preferred = match choice {
        Choice::Pick(row) => std::slice::from_ref(row),
        Choice::Rank(rank) => rank,
        Choice::Abstain | Choice::Reject(_) => &[],
    };
    let first = preferred.iter().map(|&row| row as usize).find(|&row| has_room(row));
    match first.or_else(|| native_row(replicas, seed, &has_room)) {
        Some(row) => Resolved::Row(row),
        None => Resolved::Full,
    }
}

/// The host's own router: among ready replicas with weight and room, the least work per weight (queued tokens not already
/// cached, plus running and waiting sequences); ties go by the request's seed, so that a decision can be replayed.
pub fn native_row(replicas: &ReplicaColumns, seed: u64, has_room: impl Fn(usize) -> bool) -> Option<usize> {
    /// Tokens that one more sequence in the batch is taken to cost.
    const SEQUENCE_TOKENS: u64 = 16;
    let cost = |row: usize| {
        let work = u64::from(replicas.queued_tokens[row])
            + SEQUENCE_TOKENS * (u64::from(replicas.waiting[row]) + u64::from(replicas.running[row]));
        let health = u64::from(replicas.health[row]);
        let per_weight = work.saturating_mul(1_000) / u64::from(replicas.weight[row].max(1));
        (health, per_weight)
    };
    let n = replicas.id.len();
    let start = usize::try_from(seed % n.max(1) as u64).unwrap_or(0);
    let rows = (0..n).map(|i| (start + i) % n);
    // A drained replica (weight 0) is used only when nothing else has room.
    rows.filter(|&row| has_room(row)).min_by_key(|&row| (replicas.weight[row] == 0, cost(row)))
}

/// The native policy as a [`RoutePolicy`]: abstains, so that [`resolve`] decides.
#[derive(Debug, Default)]
pub struct NativeRouter;

impl RoutePolicy for NativeRouter {
    fn route(&self, _now: Micros, _request: &RouteRequest<'_>, _replicas: &ReplicaColumns) -> Routed {
        Routed { choice: Choice::Abstain, decided_by: DecidedBy::native(0), fallback: None }
    }
}

impl Fallback {
    /// In words, as in `circuit-open` or `timeout`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CircuitOpen => "circuit-open",
            Self::NoInstance => "no-instance",
            Self::Fault(kind) => kind,
        }
    }
}

impl DecidedBy {
    /// The native policy, at the slot's generation.
    #[must_use]
    pub fn native(generation: u64) -> Self {
        static NATIVE: std::sync::LazyLock<Arc<str>> = std::sync::LazyLock::new(|| "native".into());
        Self { revision: Arc::clone(&NATIVE), generation }
    }

    /// Whether it is the native policy.
    #[must_use]
    pub fn is_native(&self) -> bool {
        *self.revision == *"native"
    }
}

impl ReplicaColumns {
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

    /// The replica behind a row.
    #[must_use]
    pub fn replica(&self, row: usize) -> ReplicaId {
        ReplicaId(self.id[row])
    }

    /// Drops the rows and keeps the memory.
    pub fn clear(&mut self) {
        let Self {
            id,
            key,
            health,
            weight,
            waiting,
            running,
            running_limit,
            queued_tokens,
            free_blocks,
            total_blocks,
            cached_tokens,
            device,
            variant,
            load,
            errors,
            age,
            predicted_ttft,
            kind,
            labels,
        } = self;
        for column in
            [id, weight, waiting, running, running_limit, queued_tokens, free_blocks, total_blocks, cached_tokens]
        {
            column.clear();
        }
        for column in [key, device, variant, load, errors, age, predicted_ttft, kind] {
            column.clear();
        }
        for (_, column) in labels {
            column.clear();
        }
        health.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicas(queued: &[u32]) -> ReplicaColumns {
        let n = queued.len();
        ReplicaColumns {
            id: (0..n).map(|i| 10 + u32::try_from(i).expect("few rows")).collect(),
            key: vec![0; n],
            health: vec![0; n],
            weight: vec![1_000; n],
            waiting: vec![0; n],
            running: vec![0; n],
            running_limit: vec![8; n],
            queued_tokens: queued.to_vec(),
            free_blocks: vec![8; n],
            total_blocks: vec![8; n],
            cached_tokens: vec![0; n],
            ..ReplicaColumns::default()
        }
    }

    #[test]
    fn choices_are_checked() {
        let rows = |r: &[u32]| Choice::Rank(r.to_vec());
        for (choice, n_rows, expect) in [
            (Choice::Abstain, 0, Ok(())),
            (Choice::Pick(1), 2, Ok(())),
            (Choice::Pick(2), 2, Err(BadChoice::OutOfRange { row: 2, rows: 2 })),
            (rows(&[1, 0]), 2, Ok(())),
            (rows(&[]), 2, Err(BadChoice::EmptyRank)),
            (rows(&[0, 0]), 2, Err(BadChoice::Duplicate(0))),
            (rows(&[0, 9]), 2, Err(BadChoice::OutOfRange { row: 9, rows: 2 })),
        ] {
            assert_eq!(check_choice(&choice, n_rows), expect, "{choice:?}");
        }
    }

    #[test]
    fn a_full_row_falls_to_the_next_and_then_to_the_native_order() {
        let columns = replicas(&[500, 0, 100]);
        for (choice, full, expect) in [
            (Choice::Pick(0), &[][..], Resolved::Row(0)),
            (Choice::Pick(0), &[0][..], Resolved::Row(1)),
            (Choice::Rank(vec![0, 2]), &[0][..], Resolved::Row(2)),
            (Choice::Rank(vec![0, 2]), &[0, 2][..], Resolved::Row(1)),
            (Choice::Abstain, &[1][..], Resolved::Row(2)),
            (Choice::Abstain, &[0, 1, 2][..], Resolved::Full),
        ] {
            assert_eq!(resolve(&choice, &columns, 7, |row| !full.contains(&row)), expect, "{choice:?} {full:?}");
        }
    }

    #[test]
    fn ties_go_by_seed_and_drained_replicas_come_last() {
        let mut columns = replicas(&[0, 0]);
        assert_eq!(native_row(&columns, 0, |_| true), Some(0));
        assert_eq!(native_row(&columns, 1, |_| true), Some(1));
        columns.weight[1] = 0;
        assert_eq!(native_row(&columns, 1, |_| true), Some(0));
        assert_eq!(native_row(&columns, 1, |row| row == 1), Some(1));
        assert_eq!(native_row(&ReplicaColumns::default(), 1, |_| true), None);
    }
}
