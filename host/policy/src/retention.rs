//! `RetentionPolicy` with a guest behind it: one instance per replica, kept by the replica's driver and called at a step
//! boundary, before free blocks run out.
//!
//! The host checks the ranking and keeps the order; a guest that faults, or has no opinion, leaves the cache with the least
//! recently used blocks at the front.

use std::sync::Arc;

use pointsman_sched::batch::Attention;
use pointsman_sched::retention::{BadRanking, BlockColumns, Ranking, RetentionPolicy, check_ranking};
use pointsman_sched::route::DecidedBy;
use pointsman_telemetry::Micros;

use crate::bindings::kv_retention::exports::pointsman::policy::kv_retention as wit;
use crate::config::Budgets;
use crate::fault::{Call, Fault, FaultKind};
use crate::instance::{Hook, Instance, ProbeFault, hook_bindings};
use crate::manifest::Wants;
use crate::resident::Resident;
use crate::slot::{SlotCore, slot_by_core};
use crate::upload::World;

/// `world kv-retention-policy`.
pub(crate) struct RetentionHook;

/// The slot `kv-retention`.
#[derive(Debug)]
pub struct RetentionSlot {
    pub(crate) core: Arc<SlotCore<RetentionHook>>,
}

slot_by_core!(RetentionSlot);

/// The retention guest of one replica, owned by its driver thread.
#[derive(Debug)]
pub struct RetentionGuest {
    resident: Resident<RetentionHook>,
}

impl RetentionSlot {
    /// A policy for one more replica.
    #[must_use]
    pub fn attach(&self, replica: &Arc<str>) -> RetentionGuest {
        RetentionGuest { resident: Resident::new(&self.core, replica) }
    }
}

impl RetentionPolicy for RetentionGuest {
    fn attend(&mut self, now: Micros) -> Attention {
        let attention = self.resident.attend(now);
        if self.resident.is_spent { Attention::Busy } else { attention }
    }

    fn rank(&mut self, now: Micros, wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
        let budget = self.resident.budgets().rank;
        let answer =
            self.resident.call(Call::Rank, now, budget, |instance, hard| rank(instance, hard, (now, wanted), blocks));
        self.resident.synced = answer.is_some();
        match answer {
            Some(Some(answer)) => {
                (ranking.evict, ranking.keep) = (answer.evict, answer.keep);
                true
            }
            Some(None) => false,
            None => {
                self.resident.fell_back();
                false
            }
        }
    }

    fn refused(&mut self, now: Micros, why: BadRanking) {
        self.resident.refused(Call::Rank, now, &why);
    }

    fn decided_by(&self) -> DecidedBy {
        self.resident.decided_by().clone()
    }
}

fn rank(
    instance: &mut Instance<RetentionHook>,
    hard: Micros,
    (now, wanted): (Micros, u32),
    blocks: &BlockColumns,
) -> Result<Option<wit::Ranking>, Fault> {
    let tenants: Vec<(u32, &str)> = blocks.new_tenants.iter().map(|(number, name)| (*number, &**name)).collect();
    let blocks = wit::Blocks {
        prefix: &blocks.prefix,
        depth: &blocks.depth,
        children: &blocks.children,
        last_used: &blocks.last_used,
        created: &blocks.created,
        hits: &blocks.hits,
        tenant: &blocks.tenant,
        new_tenants: &tenants,
    };
    instance.call(hard, now, |guest, store| guest.pointsman_policy_kv_retention().call_rank(store, now, wanted, blocks))
}

// === probe ===

impl Hook for RetentionHook {
    const WORLD: World = World::Retention;
    const MAX_ANSWER_BYTES: usize = 1 << 20;
    type Local = ();
    hook_bindings!(Retention, kv_retention, KvRetentionIndices, KvRetention);

    fn probe(instance: &mut Instance<Self>, _wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), ProbeFault> {
        for (case, blocks) in [("one block is cached", probe_blocks(1)), ("five blocks are cached", probe_blocks(5))] {
            let fault = |fault| ProbeFault { case, call: Call::Rank, fault };
            let answer = rank(instance, budgets.rank.hard, (now, 2), &blocks).map_err(fault)?;
            let Some(wit::Ranking { evict, keep }) = answer else { continue };
            check_ranking(&Ranking { evict, keep }, blocks.len(), &mut Vec::new())
                .map_err(|why| fault(Fault::new(FaultKind::BadAnswer, why.to_string())))?;
        }
        Ok(())
    }

    /// An empty cache leaves no trace: real calls name the tenants that they show.
    fn warm(instance: &mut Instance<Self>, _wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), Fault> {
        rank(instance, budgets.rank.hard, (now, 0), &BlockColumns::default()).map(drop)
    }
}

/// Prompts of two tenants, two blocks each, ends first.
fn probe_blocks(n: u32) -> BlockColumns {
    let rows = || 0..n;
    let times = |from: u64| rows().map(|row| from + u64::from(row / 2) * 10).collect();
    BlockColumns {
        prefix: rows().map(|row| 1 + u64::from(row) * 0x9e37_79b9).collect(),
        depth: rows().map(|row| 1 - row % 2).collect(),
        children: rows().map(|row| row % 2).collect(),
        last_used: times(1_000),
        created: times(900),
        hits: rows().collect(),
        tenant: rows().map(|row| 1 + row / 2 % 2).collect(),
        new_tenants: vec![(1, "probe".into()), (2, "other".into())],
    }
}
