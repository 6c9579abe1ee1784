//! Retention: least recently used first, with pins.
//!
//! The blocks of pinned tenants, and those that enough requests have found, are evicted after all others, among themselves
//! by last use. What precedes a kept block in its prompt the host keeps with it, so a shared beginning that another tenant
//! computed stays too. A pin is an order and not a reservation: a request that needs the memory gets it.
//!
//! Against plain least recent use: one long batch job touches every block once and would push out the system prompt that
//! a thousand interactive requests share.
//!
//! Configuration: `tenants` ([]), by name; `min_hits` (0: off), how many requests must have found a block.

use pointsman_plugin::{Block, Blocks, HostInfo, Manifest, Micros, Policy, Ranking, Retention};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    tenants: Vec<String>,
    min_hits: u32,
}

/// Most tenants that can be pinned: beyond, nearly everything is, and nothing is kept by it.
const MAX_TENANTS: usize = 1_000;

/// The policy.
#[derive(Debug)]
pub struct LruWithPins {
    config: Config,
    /// Numbers of the pinned tenants that were named so far, ascending.
    pinned: Vec<u32>,
}

pointsman_plugin::retention!(LruWithPins);

impl Policy for LruWithPins {
    type Config = Config;

    fn init(mut config: Config, _host: &HostInfo) -> Result<Self, String> {
        if config.tenants.len() > MAX_TENANTS {
            return Err(format!("`tenants` has {} names; at most {MAX_TENANTS} can be pinned", config.tenants.len()));
        }
        config.tenants.sort_unstable();
        Ok(Self { config, pinned: Vec::new() })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!()
    }
}

impl Retention for LruWithPins {
    fn rank(&mut self, _now: Micros, _wanted: u32, blocks: &Blocks) -> Option<Ranking> {
        for (number, name) in &blocks.new_tenants {
            if self.config.tenants.binary_search(name).is_ok()
                && let Err(place) = self.pinned.binary_search(number)
            {
                self.pinned.insert(place, *number);
            }
        }
        let Config { min_hits, .. } = self.config;
        let is_kept = |block: &Block| {
            (min_hits > 0 && block.hits >= min_hits) || self.pinned.binary_search(&block.tenant).is_ok()
        };
        // The host's order is by last use already.
        let keep: Vec<u32> = blocks.rows().filter(is_kept).map(|block| block.row).collect();
        (!keep.is_empty()).then_some(Ranking { evict: Vec::new(), keep })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing;

    fn block(tenant: u32, hits: u32) -> Block {
        Block { tenant, hits, ..Block::default() }
    }

    #[test]
    fn pinned_tenants_and_popular_blocks_go_last() {
        for (config, keep) in [
            ("{}", &[][..]),
            (r#"{"tenants": ["tenant-2"]}"#, &[1, 3]),
            (r#"{"tenants": ["tenant-9", "tenant-1"]}"#, &[0, 2]),
            (r#"{"min_hits": 3}"#, &[2, 3]),
            (r#"{"min_hits": 4, "tenants": ["tenant-1"]}"#, &[0, 2, 3]),
        ] {
            let mut policy: LruWithPins = testing::start(config).expect(config);
            let blocks = testing::blocks([block(1, 0), block(2, 0), block(1, 3), block(2, 4)]);
            let expect = (!keep.is_empty()).then(|| Ranking { evict: Vec::new(), keep: keep.to_vec() });
            assert_eq!(policy.rank(1, 4, &blocks), expect, "{config}");
            // Names are told once.
            let later = Blocks { new_tenants: Vec::new(), ..blocks };
            assert_eq!(policy.rank(2, 4, &later), expect, "{config}");
        }
        assert!(testing::start::<LruWithPins>(r#"{"tenant": []}"#).is_err());
    }
}
