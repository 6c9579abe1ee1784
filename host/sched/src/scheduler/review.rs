//! Asking the retention policy what the prefix cache should give up first.
//!
//! Before blocks are needed and not when they are: an answer serves a share of the pool's evictions, so that a cache under
//! pressure costs one call per many steps. What becomes of the answer is in `kv`.

use crate::batch::Attention;
use crate::config::Config;
use crate::hash::IntSet;
use crate::ids::{BlockId, Micros};
use crate::retention::{BlockColumns, MAX_ROWS, Ranking, RetentionPolicy, check_ranking};

use super::{Scheduler, count};

/// Share of the pool's blocks that an answer is for; it is asked again when half of them are left.
const SHARE: u32 = 8;

#[derive(Debug)]
pub(super) struct Review {
    /// `Kv::n_evicted` up to which the last answer lasts; 0 when there is none.
    good_until: u64,
    /// Tenants that the policy knows by name.
    named: IntSet<u32>,
    columns: BlockColumns,
    rows: Vec<BlockId>,
    ranking: Ranking,
    seen: Vec<bool>,
}

impl Review {
    pub(super) fn new(config: &Config) -> Self {
        let room = MAX_ROWS.min(config.n_blocks as usize);
        Self {
            good_until: 0,
            named: IntSet::default(),
            columns: BlockColumns::with_room(),
            rows: Vec::with_capacity(room),
            ranking: Ranking::default(),
            seen: Vec::with_capacity(room),
        }
    }

    /// The last answer was about other blocks.
    pub(super) fn begin_anew(&mut self) {
        self.good_until = 0;
    }
}

impl Scheduler {
    /// Lets a retention policy rank the cached blocks, where the last answer may not last for what is needed next. To be
    /// called before [`schedule`](Self::schedule); without it, the least recently used blocks are evicted first.
    pub fn review_cache(&mut self, now: Micros, policy: &mut dyn RetentionPolicy) {
        // Also where nothing is cached: a policy that was swapped out is left here.
        let attention = policy.attend(now);
        if attention == Attention::Busy {
            return;
        }
        if attention != Attention::Following {
            self.kv.forget_ranking();
            self.review.named.clear();
            self.review.good_until = 0;
        }
        let counts = self.kv.pool.counts();
        if attention == Attention::Native || counts.cached == 0 {
            return;
        }
        // How many evictions an answer is for, where no more are needed.
        let usual = (self.config.n_blocks / SHARE).clamp(1, count(MAX_ROWS));
        let needed = self.blocks_needed();
        let covered = self.review.good_until.saturating_sub(self.kv.n_evicted) + u64::from(counts.free);
        if covered < u64::from(needed.max(usual.div_ceil(2))) {
            // At least what is needed now: what cannot be admitted yet is no reason to ask again at the next step.
            let wanted = needed.saturating_sub(counts.free).max(usual);
            self.rank_cached(now, wanted, policy);
            self.review.good_until = self.kv.n_evicted + u64::from(wanted);
        }
    }

    /// Blocks that the decodes (behind a step in flight, one each at most) and as many waiting requests as have a place would take now, if nothing of them is cached.
    fn blocks_needed(&self) -> u32 {
        let places = (self.config.max_running as usize).saturating_sub(self.running.len());
        let waiting = self.waiting.tickets().iter().take(places);
        let blocks = waiting.map(|ticket| self.config.blocks_for(self.sequences[ticket.slot].n_tokens()));
        let ahead = if self.in_flight { count(self.running.len()) } else { 0 };
        blocks.fold(self.growth() + ahead, u32::saturating_add)
    }

    fn rank_cached(&mut self, now: Micros, wanted: u32, policy: &mut dyn RetentionPolicy) {
        let Review { named, columns, rows, ranking, seen, .. } = &mut self.review;
        self.kv.show(columns, rows);
        for &tenant in &columns.tenant {
            if named.insert(tenant)
                && let Some(name) = self.told.tenant(tenant)
            {
                columns.new_tenants.push((tenant, name.clone()));
            }
        }
        ranking.clear();
        if !policy.rank(now, wanted, columns, ranking) {
            return self.kv.forget_ranking();
        }
        match check_ranking(ranking, rows.len(), seen) {
            Ok(()) => {
                self.kv.follow(ranking, rows);
                self.counters.rankings_followed += 1;
            }
            Err(why) => {
                policy.refused(now, why);
                self.kv.forget_ranking();
                self.counters.rankings_refused += 1;
            }
        }
    }
}
