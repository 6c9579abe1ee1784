//! The seam to retention policies: the cached blocks that no request uses go out as columns, an order of eviction comes
//! back. Mirrors `interface kv-retention` of wit/policy.wit.
//!
//! A ranking is advice about blocks that may be used again, or gone, before anybody needs them, so nothing is moved when it
//! arrives: the cache looks at it when it must evict, skips what no longer holds, and falls back to its own order (least
//! recently used). A policy that is asked at every eviction instead would stand on the path of every step that allocates.
//!
//! No ranking keeps memory from a request: what a policy wants to keep goes last, and it does go.

use std::sync::Arc;

use crate::batch::Attention;
use crate::ids::Micros;
use crate::route::DecidedBy;

/// Most blocks that a policy is shown at once, and so the most that it can name.
pub const MAX_ROWS: usize = 1_024;

/// Cached blocks that no request uses, as columns of one length, in the host's own order of eviction; see `record blocks` in
/// the WIT package for units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of `record blocks`, documented there")]
pub struct BlockColumns {
    pub prefix: Vec<u64>,
    pub depth: Vec<u32>,
    pub children: Vec<u32>,
    pub last_used: Vec<Micros>,
    pub created: Vec<Micros>,
    pub hits: Vec<u32>,
    pub tenant: Vec<u32>,
    pub new_tenants: Vec<(u32, Arc<str>)>,
}

/// What a policy says of the rows it was shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranking {
    /// To be evicted before all others, first one first.
    pub evict: Vec<u32>,
    /// To be evicted after all others, the last one last.
    pub keep: Vec<u32>,
}

/// Why a ranking was refused as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRanking {
    /// A row that was not shown.
    #[error("the ranking names row {row} of {rows}; rows are counted from 0")]
    OutOfRange {
        /// The row.
        row: u32,
        /// How many there are.
        rows: u32,
    },
    /// A row twice, in one list or in both.
    #[error("the ranking names row {0} twice")]
    Duplicate(u32),
}

/// Ranks what the prefix cache of one replica holds. Owned by the replica's driver thread.
pub trait RetentionPolicy: Send {
    /// Asked before every step while something is cached: picks up a swap, a restart or an open circuit. A policy that
    /// [needs the view](Attention::NeedsView) knows no tenant by name, and no ranking of its is followed; one that is
    /// [busy](Attention::Busy) is not asked at this boundary, and its last ranking holds on.
    fn attend(&mut self, now: Micros) -> Attention;

    /// Ranks `blocks` into `ranking` (empty on entry); false for the host's order, also after a fault that was already
    /// counted. `wanted`: how many blocks the host expects to need before it asks again.
    fn rank(&mut self, now: Micros, wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool;

    /// The ranking just returned was refused as a whole; counts as a fault of the policy.
    fn refused(&mut self, now: Micros, why: BadRanking);

    /// Who ranks, for recordings.
    fn decided_by(&self) -> DecidedBy {
        DecidedBy::native(0)
    }
}

/// The host's own order as a [`RetentionPolicy`]: least recently used first. It never makes a call.
#[derive(Debug, Default)]
pub struct NativeRetention;

impl RetentionPolicy for NativeRetention {
    fn attend(&mut self, _now: Micros) -> Attention {
        Attention::Native
    }

    fn rank(&mut self, _now: Micros, _wanted: u32, _blocks: &BlockColumns, _ranking: &mut Ranking) -> bool {
        false
    }

    fn refused(&mut self, _now: Micros, _why: BadRanking) {}
}

/// Checks that a ranking of `n_rows` rows names only what exists, and nothing twice. `seen` is scratch memory.
///
/// # Errors
/// The first row that is wrong.
pub fn check_ranking(ranking: &Ranking, n_rows: usize, seen: &mut Vec<bool>) -> Result<(), BadRanking> {
    let rows = u32::try_from(n_rows).unwrap_or(u32::MAX);
    seen.clear();
    seen.resize(n_rows, false);
    for &row in ranking.evict.iter().chain(&ranking.keep) {
        let seen = seen.get_mut(row as usize).ok_or(BadRanking::OutOfRange { row, rows })?;
        if std::mem::replace(seen, true) {
            return Err(BadRanking::Duplicate(row));
        }
    }
    Ok(())
}

impl BlockColumns {
    /// Columns with room for [`MAX_ROWS`] rows.
    #[must_use]
    pub fn with_room() -> Self {
        Self {
            prefix: Vec::with_capacity(MAX_ROWS),
            depth: Vec::with_capacity(MAX_ROWS),
            children: Vec::with_capacity(MAX_ROWS),
            last_used: Vec::with_capacity(MAX_ROWS),
            created: Vec::with_capacity(MAX_ROWS),
            hits: Vec::with_capacity(MAX_ROWS),
            tenant: Vec::with_capacity(MAX_ROWS),
            new_tenants: Vec::new(),
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.prefix.len()
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.prefix.is_empty()
    }

    /// Drops the rows and keeps the memory.
    pub fn clear(&mut self) {
        let Self { prefix, depth, children, last_used, created, hits, tenant, new_tenants } = self;
        for column in [prefix, last_used, created] {
            column.clear();
        }
        for column in [depth, children, hits, tenant] {
            column.clear();
        }
        new_tenants.clear();
    }
}

impl Ranking {
    /// Empties the ranking and keeps its memory.
    pub fn clear(&mut self) {
        self.evict.clear();
        self.keep.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ranking_names_each_row_once() {
        let out_of_range = |row, rows| Err(BadRanking::OutOfRange { row, rows });
        for (evict, keep, n_rows, expect) in [
            (vec![], vec![], 0, Ok(())),
            (vec![2, 0], vec![1], 3, Ok(())),
            (vec![3], vec![], 3, out_of_range(3, 3)),
            (vec![], vec![u32::MAX], 3, out_of_range(u32::MAX, 3)),
            (vec![], vec![0], 0, out_of_range(0, 0)),
            (vec![1, 1], vec![], 3, Err(BadRanking::Duplicate(1))),
            (vec![], vec![0, 2, 0], 3, Err(BadRanking::Duplicate(0))),
            (vec![2], vec![2], 3, Err(BadRanking::Duplicate(2))),
        ] {
            let ranking = Ranking { evict, keep };
            // Whatever an earlier check left behind.
            let mut seen = vec![true; 2];
            assert_eq!(check_ranking(&ranking, n_rows, &mut seen), expect, "{ranking:?} of {n_rows}");
        }
    }
}
