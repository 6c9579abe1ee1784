//! `RetentionPolicy` with a guest behind it: one instance per replica, kept by the replica's driver and called at a step
//! boundary, before free blocks run out.
//!
//! The host checks the ranking and keeps the order; a guest that faults, or has no opinion, leaves the cache with the least
//! recently used blocks at the front.
//!
//! A shadow is asked call by call, as a router's: a ranking needs no earlier one. What it needs is the names of tenants, each
//! told once, so it has an instance per replica and is told those that this one has not met. Compared is what a ranking is for:
//! which blocks go before the next call, not whether two orders are written alike.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use pointsman_sched::batch::Attention;
use pointsman_sched::retention::{BadRanking, BlockColumns, Ranking, RetentionPolicy, check_ranking};
use pointsman_sched::route::DecidedBy;
use pointsman_telemetry::Micros;

use crate::bindings::kv_retention::exports::pointsman::policy::kv_retention as wit;
use crate::config::Budgets;
use crate::engine::stopwatch_ns;
use crate::fault::{Call, Fault, FaultKind};
use crate::generation::Renewed;
use crate::instance::{Hook, Instance, ProbeFault, hook_bindings};
use crate::manifest::Wants;
use crate::resident::Resident;
use crate::shadow::{Case, Post, Shadow, Verdict};
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
    /// Names of the tenants that were shown since all of them were told; as many as the host has names.
    names: BTreeMap<u32, Arc<str>>,
    /// Whether they are told though no policy is active: its shadow wants them.
    only_shadowed: bool,
    n_calls: u64,
}

impl RetentionSlot {
    /// A policy for one more replica.
    #[must_use]
    pub fn attach(&self, replica: &Arc<str>) -> RetentionGuest {
        let resident = Resident::new(&self.core, replica);
        RetentionGuest { resident, names: BTreeMap::new(), only_shadowed: false, n_calls: 0 }
    }
}

impl RetentionPolicy for RetentionGuest {
    fn attend(&mut self, now: Micros) -> Attention {
        let attention = match self.resident.attend(now) {
            _ if self.resident.is_spent => Attention::Busy,
            Attention::Native if self.resident.guest().is_none() && self.resident.core.is_shadowed() => {
                // Nobody else is to be asked: the answer will be the host's order.
                if self.only_shadowed { Attention::Following } else { Attention::NeedsView }
            }
            attention => attention,
        };
        self.only_shadowed = self.resident.guest().is_none() && attention != Attention::Native;
        if matches!(attention, Attention::Native | Attention::NeedsView) {
            self.names.clear();
        }
        attention
    }

    fn rank(&mut self, now: Micros, wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
        let is_ranked = self.ask(now, wanted, blocks, ranking);
        self.names.extend(blocks.new_tenants.iter().cloned());
        if let Some(shadow) = self.resident.core.shadowed() {
            self.tell(&shadow, (now, wanted, blocks), ranking);
        }
        is_ranked
    }

    fn refused(&mut self, now: Micros, why: BadRanking) {
        self.resident.refused(Call::Rank, now, &why);
    }

    fn decided_by(&self) -> DecidedBy {
        self.resident.decided_by().clone()
    }
}

impl RetentionGuest {
    fn ask(&mut self, now: Micros, wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
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

    /// Puts a call to the shadow, with the answer that was used: an empty one is the host's order.
    #[cold]
    fn tell(
        &mut self,
        shadow: &Shadow<RetentionHook>,
        (now, wanted, blocks): (Micros, u32, &BlockColumns),
        used: &Ranking,
    ) {
        self.n_calls += 1;
        if !shadow.case.samples(self.n_calls) {
            return;
        }
        shadow.put(blocks.len(), || {
            let tenants: BTreeSet<u32> = blocks.tenant.iter().copied().collect();
            let name = |number| Some((number, Arc::clone(self.names.get(&number)?)));
            let new_tenants = tenants.into_iter().filter_map(name).collect();
            let blocks = BlockColumns { new_tenants, ..blocks.clone() };
            let shown = Shown { now, wanted, blocks, used: used.clone() };
            RetentionSample { replica: Arc::clone(&self.resident.owner), shown: Some(Box::new(shown)) }
        });
    }
}

impl Drop for RetentionGuest {
    fn drop(&mut self) {
        if let Some(shadow) = self.resident.core.any_shadow() {
            // Where that does not fit, its instance goes with the shadow.
            shadow.offer(0, || RetentionSample { replica: Arc::clone(&self.resident.owner), shown: None });
        }
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

// === shadow ===

/// What the shadow's thread is told of a replica.
pub(crate) struct RetentionSample {
    replica: Arc<str>,
    /// None where the replica has gone.
    shown: Option<Box<Shown>>,
}

struct Shown {
    now: Micros,
    wanted: u32,
    /// With the names of all their tenants.
    blocks: BlockColumns,
    /// What the active policy said; empty for the host's order.
    used: Ranking,
}

/// What the shadow's thread keeps: a place per replica.
pub(crate) type Librarians = HashMap<Arc<str>, Librarian>;

/// A guest that looks at one replica.
pub(crate) struct Librarian {
    post: Post<RetentionHook>,
    /// Tenants that its instance knows by name.
    named: BTreeSet<u32>,
}

impl Librarian {
    fn answer(&mut self, shown: &mut Shown) -> Option<Ranking> {
        if self.post.is_native() {
            return Some(Ranking::default());
        }
        let Shown { now, wanted, blocks, .. } = shown;
        if self.post.renew(*now) != Renewed::Not {
            self.named.clear();
        }
        let (guest, instance) = self.post.parts()?;
        blocks.new_tenants.retain(|(number, _)| !self.named.contains(number));
        let what = (Call::Rank, guest.budgets().rank);
        let answer = guest.call(instance, *now, what, |i, hard| rank(i, hard, (*now, *wanted), blocks))?;
        self.named.extend(blocks.new_tenants.iter().map(|(number, _)| *number));
        let ranking = answer.map_or_else(Ranking::default, |wit::Ranking { evict, keep }| Ranking { evict, keep });
        match check_ranking(&ranking, blocks.len(), &mut Vec::new()) {
            Ok(()) => Some(ranking),
            Err(why) => {
                self.post.refuse((Call::Rank, *now), &why);
                None
            }
        }
    }
}

/// Compares which blocks go first, as many as are wanted: how many are the same, and how many are not. Where all that is shown
/// is wanted there is nothing to choose.
fn compare(used: &Ranking, shadow: &Ranking, (wanted, n_rows): (u32, usize)) -> [(Verdict, u64); 2] {
    let n_gone = usize::try_from(wanted).unwrap_or(usize::MAX);
    let n_same = if n_gone >= n_rows {
        None
    } else {
        let (used, shadow) = (first(used, n_rows, n_gone), first(shadow, n_rows, n_gone));
        Some(used.iter().zip(&shadow).filter(|(used, shadow)| **used && **shadow).count())
    };
    let (same, others) = n_same.map_or((0, 0), |same| (same as u64, (n_gone - same) as u64));
    [(Verdict::Agrees, same), (Verdict::Differs(0), others)]
}

/// Which rows are among the first `n` that go, by a ranking as it is written.
fn first(ranking: &Ranking, n_rows: usize, n: usize) -> Vec<bool> {
    let (mut is_listed, mut goes) = (vec![false; n_rows], vec![false; n_rows]);
    ranking.evict.iter().chain(&ranking.keep).for_each(|&row| is_listed[row as usize] = true);
    let evict = ranking.evict.iter().map(|&row| row as usize);
    let in_turn = (0..n_rows).filter(|&row| !is_listed[row]);
    let keep = ranking.keep.iter().map(|&row| row as usize);
    evict.chain(in_turn).chain(keep).take(n).for_each(|row| goes[row] = true);
    goes
}

// === probe ===

impl Hook for RetentionHook {
    const WORLD: World = World::Retention;
    const MAX_ANSWER_BYTES: usize = 1 << 20;
    type Local = ();
    const DIFFERENCES: &'static [&'static str] = &["other-block"];
    hook_bindings!(Retention, kv_retention, KvRetentionIndices, KvRetention, RetentionSample, Librarians, ());

    fn shadow(case: &Case<Self>, librarians: &mut Librarians, sample: RetentionSample) {
        let RetentionSample { replica, shown } = sample;
        let Some(mut shown) = shown else { return drop(librarians.remove(&replica)) };
        let new = || Librarian { post: Post::new(&case.candidate, Arc::clone(&replica)), named: BTreeSet::new() };
        let librarian = librarians.entry(Arc::clone(&replica)).or_insert_with(new);
        let started = stopwatch_ns();
        let answer = librarian.answer(&mut shown);
        let took_ns = stopwatch_ns() - started;
        let n_rows = shown.blocks.len();
        // The active policy's answer is checked by the scheduler after this was copied: the host's order stands in.
        let is_used = check_ranking(&shown.used, n_rows, &mut Vec::new()).is_ok();
        let used = if is_used { shown.used } else { Ranking::default() };
        match answer {
            Some(answer) => case.judged_each(compare(&used, &answer, (shown.wanted, n_rows)), Some(took_ns)),
            None => case.judged(Verdict::NoAnswer, took_ns),
        }
    }

    fn shadow_paused(
        case: &Case<Self>,
        librarians: &mut Librarians,
        RetentionSample { replica, shown }: RetentionSample,
    ) {
        match shown {
            None => drop(librarians.remove(&replica)),
            Some(_) => case.skipped(librarians, 1),
        }
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compared_is_what_goes_before_the_next_call() {
        let ranking = |evict: &[u32], keep: &[u32]| Ranking { evict: evict.to_vec(), keep: keep.to_vec() };
        let host = ranking(&[], &[]);
        for (used, shadow, wanted, same, others) in [
            (&host, ranking(&[], &[]), 2, 2, 0),
            (&host, ranking(&[1, 0], &[]), 2, 2, 0),
            (&host, ranking(&[], &[3]), 2, 2, 0),
            (&host, ranking(&[], &[0]), 2, 1, 1),
            (&host, ranking(&[3], &[]), 2, 1, 1),
            (&ranking(&[3, 2], &[]), ranking(&[], &[2, 3]), 2, 0, 2),
            (&ranking(&[2], &[0, 1]), ranking(&[], &[0, 1]), 3, 3, 0),
            (&host, ranking(&[], &[0]), 4, 0, 0),
            (&host, ranking(&[], &[0]), u32::MAX, 0, 0),
            (&host, ranking(&[], &[]), 0, 0, 0),
        ] {
            let found = compare(used, &shadow, (wanted, 4));
            assert_eq!(found, [(Verdict::Agrees, same), (Verdict::Differs(0), others)], "{used:?} {shadow:?} {wanted}");
        }
    }
}
