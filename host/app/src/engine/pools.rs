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

use super::{Engine, Home, Served};
use crate::serve::Shared;

/// The bounds of a replica's pool, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolBounds {
    /// Bytes of a block; 0 on a device that has no memory.
    pub block_bytes: u64,
    /// One full context; all, where the pool keeps its size.
    pub least: u32,
    /// What it has then.
    pub least_bytes: u64,
    /// All that it was made with.
    pub most: u32,
    /// Where there is room: all, or what an operator wants.
    pub wanted: u32,
    /// Whether the device can give back a part of it.
    pub can_shrink: bool,
}

/// Why pools were not bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotBounded {
    /// There is no such device.
    NoDevice,
    /// Its pools keep their size.
    Fixed,
    /// It serves no more, or its driver has refused.
    Failed,
}

// === impl PoolBounds ===

impl PoolBounds {
    /// Of a pool that has just been made.
    pub(crate) fn of(executor: &mut dyn Executor, sched: &Config, bytes: u64) -> Self {
        let most = sched.n_blocks;
        let context = sched.context_tokens.div_ceil(sched.block_tokens).min(most);
        let can_resize = executor.resize_pool(most).is_ok_and(|sized| sized.is_some());
        // Not where all of it is one piece of what is given back at once.
        let can_shrink = can_resize && executor.pool_bytes(context) < executor.pool_bytes(most);
        let (least, least_bytes) = if can_shrink { (context, executor.pool_bytes(context)) } else { (most, bytes) };
        Self { block_bytes: bytes / u64::from(most.max(1)), least, least_bytes, most, wanted: most, can_shrink }
    }

    /// What a pool has that holds so many bytes, and must keep.
    pub(crate) fn share(&self, bytes: u64) -> PoolShare {
        let least = if self.can_shrink { self.least_bytes } else { bytes };
        PoolShare { bytes, least: least.min(bytes) }
    }

    /// Blocks of a pool of at most so many bytes, which has one full context at least.
    pub(crate) fn blocks_in(&self, bytes: u64) -> u32 {
        let n_blocks = bytes / self.block_bytes.max(1);
        u32::try_from(n_blocks).unwrap_or(u32::MAX).clamp(self.least, self.most)
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
    /// What pools on a device have, and must keep.
    pub(crate) fn pool_shares(&self, device: &str) -> Vec<PoolShare> {
        let homes = self.device_named(device).map(|at| self.homes_at(at)).unwrap_or_default();
        homes.iter().map(|home| home.pool.share(home.memory.kv)).collect()
    }

    /// Has pools that are larger shrink to so many bytes; whether one has.
    pub(crate) fn shrink_pools(&self, device: &str, bytes: u64, shared: &Shared) -> bool {
        let mut has_shrunk = false;
        for home in self.device_named(device).map(|at| self.homes_at(at)).unwrap_or_default() {
            let (n_blocks, before) = (home.pool.blocks_in(bytes), home.n_blocks());
            if n_blocks < before {
                let sized = self.resize_pool(&home, n_blocks, shared);
                has_shrunk |= sized.is_some_and(|sized| sized.n_blocks < before);
            }
        }
        has_shrunk
    }

    /// Lets all pools have again what they are to have, where there is not room for all equal shares.
    pub(crate) fn grow_pools(&self, shared: &Shared) {
        for at in 0..self.devices.len() {
            let mut homes = self.homes_at(at);
            homes.retain(|home| home.n_blocks() < home.pool.wanted);
            // The first says what there is.
            let Some(first) = homes.first() else { continue };
            let Some(sized) = self.resize_pool(first, first.n_blocks(), shared) else { continue };
            let share = growth(&homes, sized.spare);
            for home in homes {
                let n_blocks = home.pool.blocks_in(share).min(home.pool.wanted);
                if n_blocks > home.n_blocks() {
                    self.resize_pool(&home, n_blocks, shared);
                }
            }
        }
    }

    /// Gives the pools of a device at most so many bytes each from now on, or all that they were made with.
    ///
    /// # Errors
    /// There is no such device, or some of its pools are as they were.
    pub(crate) fn bound_pools(&self, device: &str, bytes: Option<u64>, shared: &Shared) -> Result<(), NotBounded> {
        let homes = self.homes_at(self.device_named(device).ok_or(NotBounded::NoDevice)?);
        if !homes.is_empty() && homes.iter().all(|home| !home.pool.can_shrink) {
            return Err(NotBounded::Fixed);
        }
        let mut bounded = Ok(());
        for home in homes.iter().filter(|home| home.pool.can_shrink) {
            let wanted = bytes.map_or(home.pool.most, |bytes| home.pool.blocks_in(bytes));
            self.change_home(home, |home| home.pool.wanted = wanted);
            if wanted < home.n_blocks() && self.resize_pool(home, wanted, shared).is_none() {
                bounded = Err(NotBounded::Failed);
            }
        }
        self.grow_pools(shared);
        bounded
    }

    /// Empties the prefix caches of a device: how many blocks of each replica held a prefix. `None` where there is no such device.
    pub(crate) fn clear_caches(&self, device: &str) -> Option<Vec<wire::ClearedReplica>> {
        let at = self.device_named(device)?;
        let clear = |home: &Home| {
            let kv_blocks = self.devices[at].driver.clear_cache(home.replica.id).ok()?;
            Some(wire::ClearedReplica { name: home.replica.name.to_string(), kv_blocks })
        };
        Some(self.homes_at(at).iter().filter_map(clear).collect())
    }

    /// What a pool has then; `None` where it keeps its size.
    fn resize_pool(&self, home: &Home, n_blocks: u32, shared: &Shared) -> Option<PoolSize> {
        let (replica, before, device) = (&home.replica, home.n_blocks(), &self.devices[home.device]);
        let sized = device.driver.resize(replica.id, n_blocks).ok().flatten()?;
        self.change_home(home, |home| home.memory.kv = sized.bytes);
        if sized.n_blocks != before {
            let (variant, device) = (&*home.variant, &*device.place.name());
            shared.metrics.resized_pool(variant, device, home.block_tokens, (before, sized.n_blocks));
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

    fn change_home(&self, of: &Home, change: impl Fn(&mut Home)) {
        self.served.rcu(|served| {
            let mut next = Served::clone(served);
            next.homes.entry(of.replica.id).and_modify(&change);
            Arc::new(next)
        });
    }
}

/// The bytes to which pools can grow together that are to grow, where so many are left: the smallest first.
fn growth(homes: &[Home], spare: u64) -> u64 {
    let mut has: Vec<u64> = homes.iter().map(|home| home.memory.kv).collect();
    has.sort_unstable();
    level(&has, spare)
}

/// To what level so much water rises over these grounds, which are sorted.
fn level(grounds: &[u64], water: u64) -> u64 {
    let mut below = 0;
    for (n, ground) in grounds.iter().enumerate() {
        // What fills all before it up to its height.
        if n as u64 * ground - below > water {
            return (below + water) / n as u64;
        }
        below += ground;
    }
    below.saturating_add(water) / (grounds.len() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn water_rises_to_one_level_over_what_it_covers() {
        for (grounds, water, expect) in [
            (&[10, 20, 30][..], 0, 10),
            (&[10, 20, 30], 6, 16),
            (&[10, 20, 30], 10, 20),
            (&[10, 20, 30], 16, 23),
            (&[10, 20, 30], 90, 50),
            (&[7], 5, 12),
            (&[], 5, 5),
        ] {
            assert_eq!(level(grounds, water), expect, "{grounds:?} {water}");
        }
    }

    #[test]
    fn a_pool_keeps_one_full_context_and_has_no_more_than_it_was_made_with() {
        let bounds =
            PoolBounds { block_bytes: 100, least: 4, least_bytes: 512, most: 64, wanted: 64, can_shrink: true };
        for (bytes, expect) in [(0, 4), (399, 4), (1_099, 10), (6_400, 64), (u64::MAX, 64)] {
            assert_eq!(bounds.blocks_in(bytes), expect, "{bytes}");
        }
        assert_eq!(bounds.share(1_050), PoolShare { bytes: 1_050, least: 512 });
        let fixed = PoolBounds { can_shrink: false, ..bounds };
        assert_eq!(fixed.share(1_050), PoolShare { bytes: 1_050, least: 1_050 });
        assert_eq!(PoolBounds { block_bytes: 0, ..bounds }.blocks_in(10), 10, "of no memory");
    }
}
