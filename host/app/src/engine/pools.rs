//! KV pools: how large each is and may be, and how those of a GPU make room for one another.
//!
//! A pool takes what is left of its GPU when its model is loaded, so a model that comes later finds little. Then the pools that are
//! there shrink to equal shares, and grow again when what they made room for has gone or takes less. On the CPU pools keep the size that
//! the configuration gives them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pointsman_engine::cuda::PoolShare;
use pointsman_server::admin::wire;

use super::{Engine, Home, Served};
use crate::models::LoadedReplica;
use crate::serve::Shared;

/// The bounds of a replica's pool, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolBounds {
    /// Bytes of a block; 0 on a device that has no memory.
    pub block_bytes: u64,
    /// One full context.
    pub least: u32,
    /// All that it was made with.
    pub most: u32,
    /// Where there is room: all, or what an operator wants.
    pub wanted: u32,
}

// === impl PoolBounds ===

impl PoolBounds {
    pub(crate) fn of(loaded: &LoadedReplica) -> Self {
        let most = loaded.sched.n_blocks;
        let least = loaded.sched.context_tokens.div_ceil(loaded.sched.block_tokens).min(most);
        Self { block_bytes: loaded.memory.kv / u64::from(loaded.kv_blocks.max(1)), least, most, wanted: most }
    }

    /// What a pool of so many blocks has, and must keep.
    pub(crate) fn share(&self, n_blocks: u32) -> PoolShare {
        PoolShare { bytes: u64::from(n_blocks) * self.block_bytes, least: u64::from(self.least) * self.block_bytes }
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
        homes.iter().map(|home| home.pool.share(home.n_blocks())).collect()
    }

    /// Has pools that are larger shrink to so many bytes; whether one has.
    pub(crate) fn shrink_pools(&self, device: &str, bytes: u64, shared: &Shared) -> bool {
        let mut has_shrunk = false;
        for home in self.device_named(device).map(|at| self.homes_at(at)).unwrap_or_default() {
            let n_blocks = home.pool.blocks_in(bytes);
            if n_blocks < home.n_blocks() {
                let n_before = home.n_blocks();
                has_shrunk |= self.resize_pool(&home, n_blocks, shared).is_some_and(|n_blocks| n_blocks < n_before);
            }
        }
        has_shrunk
    }

    /// Lets all pools have again what they are to have, as far as there is room.
    pub(crate) fn grow_pools(&self, shared: &Shared) {
        for at in 0..self.devices.len() {
            for home in self.homes_at(at).iter().filter(|home| home.n_blocks() < home.pool.wanted) {
                self.resize_pool(home, home.pool.wanted, shared);
            }
        }
    }

    /// Gives the pools of a device at most so many bytes each from now on, or all that they were made with; whether they can have other
    /// sizes. `None` where there is no such device.
    pub(crate) fn bound_pools(&self, device: &str, bytes: Option<u64>, shared: &Shared) -> Option<bool> {
        let homes = self.homes_at(self.device_named(device)?);
        let mut are_resized = true;
        for home in &homes {
            let wanted = bytes.map_or(home.pool.most, |bytes| home.pool.blocks_in(bytes));
            let is_resized = self.resize_pool(home, wanted, shared).is_some();
            if is_resized {
                self.change_home(home, |home| home.pool.wanted = wanted);
            }
            are_resized &= is_resized;
        }
        Some(are_resized)
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

    /// The blocks that a pool has then; `None` where it keeps its size.
    fn resize_pool(&self, home: &Home, n_blocks: u32, shared: &Shared) -> Option<u32> {
        let (replica, before, device) = (&home.replica, home.n_blocks(), &self.devices[home.device]);
        let sized = device.driver.resize(replica.id, n_blocks).ok().flatten()?;
        self.change_home(home, |home| home.memory.kv = sized.bytes);
        if sized.n_blocks != before {
            let (variant, device) = (&*home.variant, &*device.place.name());
            shared.metrics.resized_pool(variant, device, home.block_tokens, (before, sized.n_blocks));
            tracing::info!("{}: the KV pool has {} blocks instead of {before}", replica.name, sized.n_blocks);
        }
        Some(sized.n_blocks)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_keeps_one_full_context_and_has_no_more_than_it_was_made_with() {
        let bounds = PoolBounds { block_bytes: 100, least: 4, most: 64, wanted: 64 };
        for (bytes, expect) in [(0, 4), (399, 4), (1_099, 10), (6_400, 64), (u64::MAX, 64)] {
            assert_eq!(bounds.blocks_in(bytes), expect, "{bytes}");
        }
        assert_eq!(bounds.share(10), PoolShare { bytes: 1_000, least: 400 });
        assert_eq!(PoolBounds { block_bytes: 0, ..bounds }.blocks_in(10), 10, "of no memory");
    }
}
