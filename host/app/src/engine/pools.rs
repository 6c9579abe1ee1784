//! KV pools: how large each is and may be, and how those of a GPU make room for one another.
//!
//! A pool takes what is left of its GPU when its model is loaded, so a model that comes later finds little. Then the pools that are
//! there shrink to equal shares, and grow again when what they made room for has gone or takes less. On the CPU pools keep the size that
//! the configuration gives them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pointsman_engine::cuda::PoolShare;
use pointsman_sched::config::Config;
use pointsman_sched::execute::{Executor, PoolSize};
use pointsman_server::admin::wire;

use super::{Engine, Home, Served, ServingDevice};
use crate::devices::Place;

/// The bounds of a replica's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolBounds {
    /// Bytes of a block; 0 on a device that has no memory.
    pub block_bytes: u64,
    /// Bytes that are given back and taken at once.
    pub piece_bytes: u64,
    /// All that it was made with.
    pub bytes: u64,
    /// Blocks of one full context; all, where the pool keeps its size.
    pub least: u32,
    /// All.
    pub most: u32,
    /// Whether the device can give back a part of it.
    pub can_shrink: bool,
}

/// Why pools or caches are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PoolRefusal {
    /// There is no such device.
    NoDevice,
    /// It serves no more.
    Down,
    /// Its pools keep their size.
    Fixed,
    /// Its driver has refused, or does not answer.
    Failed,
}

// === impl PoolBounds ===

impl PoolBounds {
    /// Of a pool that has just been made.
    pub(crate) fn of(executor: &mut dyn Executor, sched: &Config, bytes: u64) -> Self {
        let most = sched.n_blocks;
        let can_resize = executor.resize_pool(most).is_ok_and(|sized| sized.is_some());
        let context = sched.context_tokens.div_ceil(sched.block_tokens).min(most);
        let (block_bytes, piece_bytes) = (bytes / u64::from(most.max(1)), executor.pool_piece().max(1));
        let whole = Self { block_bytes, piece_bytes, bytes, least: context, most, can_shrink: true };
        // Not where all of it is one piece.
        match can_resize && whole.bytes_of(context) < bytes {
            true => whole,
            false => Self { least: most, can_shrink: false, ..whole },
        }
    }

    /// What a pool has that holds so many bytes, and must keep.
    pub(crate) fn share(&self, bytes: u64) -> PoolShare {
        let least = if self.can_shrink { self.bytes_of(self.least) } else { bytes };
        PoolShare { bytes, least: least.min(bytes) }
    }

    /// Blocks of a pool of at most so many bytes in whole pieces, which has one full context at least.
    pub(crate) fn blocks_in(&self, bytes: u64) -> u32 {
        if bytes >= self.bytes {
            return self.most;
        }
        let n_blocks = bytes / self.piece_bytes * self.piece_bytes / self.block_bytes.max(1);
        u32::try_from(n_blocks).unwrap_or(u32::MAX).clamp(self.least, self.most)
    }

    /// The memory of so many blocks, in whole pieces.
    fn bytes_of(&self, n_blocks: u32) -> u64 {
        (u64::from(n_blocks) * self.block_bytes).next_multiple_of(self.piece_bytes).min(self.bytes)
    }
}

// === impl Home ===

impl Home {
    /// Blocks that its pool has now.
    fn n_blocks(&self) -> u32 {
        self.replica.gauges.total_blocks.load(Ordering::Relaxed)
    }
}

// === impl Engine ===

impl Engine {
    /// What the pools of a device's replicas have and must keep, with their variants' names.
    pub(crate) fn pool_shares(&self, device: &str) -> Vec<(Arc<str>, PoolShare)> {
        let homes = self.device_named(device).map(|at| self.homes_at(at)).unwrap_or_default();
        homes.iter().map(|home| (Arc::clone(&home.variant), home.pool.share(home.memory.kv))).collect()
    }

    /// Has pools that are larger shrink to so many bytes; whether one has.
    pub(crate) fn shrink_pools(&self, device: &str, bytes: u64) -> bool {
        let mut has_shrunk = false;
        for home in self.device_named(device).map(|at| self.homes_at(at)).unwrap_or_default() {
            let (n_blocks, before) = (home.pool.blocks_in(bytes), home.n_blocks());
            if n_blocks < before {
                let sized = self.resize_pool(&home, n_blocks);
                has_shrunk |= sized.is_some_and(|sized| sized.n_blocks < before);
            }
        }
        has_shrunk
    }

    /// Gives all pools the sizes that they are to have: none has more than its device's bound, and all have that again, or what they
    /// were made with, as far as there is room.
    pub(crate) fn settle_pools(&self) {
        let alive = |at: &usize| self.devices[*at].driver.is_alive();
        for at in (0..self.devices.len()).filter(alive) {
            // Whoever bounds pools hears of it, and the log has it.
            let _ = self.lower_pools(at);
            self.grow_pools(at);
        }
    }

    /// Gives the pools of a device at most so many bytes each from now on, those of models that come later too; or what they were made
    /// with.
    ///
    /// # Errors
    /// There is no such device, or some of its pools are as they were.
    pub(crate) fn bound_pools(&self, device: &str, bytes: Option<u64>) -> Result<(), PoolRefusal> {
        let at = self.device_named(device).ok_or(PoolRefusal::NoDevice)?;
        let ServingDevice { place, driver, pool_bound, .. } = &self.devices[at];
        if !driver.is_alive() {
            return Err(PoolRefusal::Down);
        }
        let homes = self.homes_at(at);
        let is_fixed = !homes.is_empty() && homes.iter().all(|home| !home.pool.can_shrink);
        if is_fixed || !matches!(place, Place::Cuda(_)) {
            return Err(PoolRefusal::Fixed);
        }
        pool_bound.store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
        let lowered = self.lower_pools(at);
        self.grow_pools(at);
        lowered
    }

    /// Empties the prefix caches of a device: how many blocks of each replica held a prefix.
    ///
    /// # Errors
    /// There is no such device, or it does not answer.
    pub(crate) fn clear_caches(&self, device: &str) -> Result<Vec<wire::ClearedReplica>, PoolRefusal> {
        let at = self.device_named(device).ok_or(PoolRefusal::NoDevice)?;
        let driver = &self.devices[at].driver;
        if !driver.is_alive() {
            return Err(PoolRefusal::Down);
        }
        let mut cleared = Vec::new();
        for home in self.homes_at(at) {
            match driver.clear_cache(home.replica.id) {
                Ok(kv_blocks) => cleared.push(wire::ClearedReplica { name: home.replica.name.to_string(), kv_blocks }),
                // One that has gone meanwhile has no cache.
                Err(_) if self.served.load().homes.contains_key(&home.replica.id) => return Err(PoolRefusal::Failed),
                Err(_) => {}
            }
        }
        Ok(cleared)
    }

    /// Has pools give back what is above their device's bound.
    fn lower_pools(&self, at: usize) -> Result<(), PoolRefusal> {
        let mut lowered = Ok(());
        for home in self.homes_at(at) {
            let wanted = self.wanted_blocks(&home);
            if wanted < home.n_blocks() && self.resize_pool(&home, wanted).is_none() {
                lowered = Err(PoolRefusal::Failed);
            }
        }
        lowered
    }

    /// Lets pools have again what they are to have, up to one size where there is not room for all.
    fn grow_pools(&self, at: usize) {
        let mut homes = self.homes_at(at);
        homes.retain(|home| home.n_blocks() < self.wanted_blocks(home));
        // The first says what there is.
        let Some(first) = homes.first() else { return };
        let Some(sized) = self.resize_pool(first, first.n_blocks()) else { return };
        let wishes = homes.iter().map(|home| (home.memory.kv, home.pool.bytes_of(self.wanted_blocks(home))));
        let most = level(&wishes.collect::<Vec<_>>(), sized.spare);
        for home in homes {
            let n_blocks = home.pool.blocks_in(most).min(self.wanted_blocks(&home));
            if n_blocks > home.n_blocks() {
                self.resize_pool(&home, n_blocks);
            }
        }
    }

    /// Blocks that a pool is to have where there is room.
    fn wanted_blocks(&self, home: &Home) -> u32 {
        home.pool.blocks_in(self.devices[home.device].pool_bound.load(Ordering::Relaxed))
    }

    /// What a pool has then; `None` where it keeps its size.
    fn resize_pool(&self, home: &Home, n_blocks: u32) -> Option<PoolSize> {
        let (replica, before, device) = (&home.replica, home.n_blocks(), &self.devices[home.device]);
        let sized = device.driver.resize(replica.id, n_blocks).ok().flatten()?;
        self.served.rcu(|served| {
            let mut next = Served::clone(served);
            next.homes.entry(replica.id).and_modify(|home| home.memory.kv = sized.bytes);
            Arc::new(next)
        });
        if sized.n_blocks != before {
            tracing::info!("{}: the KV pool has {} blocks instead of {before}", replica.name, sized.n_blocks);
        }
        Some(sized)
    }

    fn device_named(&self, name: &str) -> Option<usize> {
        self.devices.iter().position(|device| device.place.name() == name)
    }

    /// In the order of their creation.
    fn homes_at(&self, at: usize) -> Vec<Home> {
        let served = self.served.load();
        let mut homes: Vec<Home> = served.homes.values().filter(|home| home.device == at).cloned().collect();
        homes.sort_by_key(|home| home.replica.id);
        homes
    }
}

/// The most that pools can have each which have so many bytes and want others, where so many are left.
fn level(pools: &[(u64, u64)], spare: u64) -> u64 {
    let taken = |level: u64| pools.iter().map(|&(has, wants)| level.clamp(has, wants.max(has)) - has).sum::<u64>();
    let (mut fits, mut too_much) = (0, pools.iter().map(|(_, wants)| *wants).max().unwrap_or(0) + 1);
    while too_much - fits > 1 {
        let middle = fits + (too_much - fits) / 2;
        if taken(middle) <= spare { fits = middle } else { too_much = middle }
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_rises_to_one_level_over_pools_that_want_it() {
        for (pools, spare, expect) in [
            (&[(10, 50), (20, 50), (30, 50)][..], 0, 10),
            (&[(10, 50), (20, 50), (30, 50)], 6, 16),
            (&[(10, 50), (20, 50), (30, 50)], 16, 23),
            (&[(10, 50), (20, 50), (30, 50)], 90, 50),
            (&[(10, 50), (20, 50), (30, 50)], 900, 50),
            // What one does not want is the other's.
            (&[(20, 60), (1, 2)], 40, 59),
            (&[(7, 100)], 5, 12),
            (&[], 5, 0),
        ] {
            assert_eq!(level(pools, spare), expect, "{pools:?} {spare}");
        }
    }

    #[test]
    fn a_pool_keeps_one_full_context_and_has_no_more_than_it_was_made_with() {
        let bounds =
            PoolBounds { block_bytes: 100, piece_bytes: 256, bytes: 6_400, least: 4, most: 64, can_shrink: true };
        for (bytes, expect) in [(0, 4), (399, 4), (1_100, 10), (6_399, 61), (6_400, 64), (u64::MAX, 64)] {
            let n_blocks = bounds.blocks_in(bytes);
            assert_eq!(n_blocks, expect, "{bytes}");
            assert!(bounds.bytes_of(n_blocks) <= bytes.max(bounds.bytes_of(4)), "{bytes}");
        }
        assert_eq!(bounds.share(1_050), PoolShare { bytes: 1_050, least: 512 });
        let fixed = PoolBounds { can_shrink: false, ..bounds };
        assert_eq!(fixed.share(1_050), PoolShare { bytes: 1_050, least: 1_050 });
        assert_eq!(PoolBounds { block_bytes: 0, bytes: 0, ..bounds }.blocks_in(10), 64, "of no memory");
    }
}
