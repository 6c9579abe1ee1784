//! Router: a session stays on its replica until that one is saturated, and comes back when it is not.
//!
//! Weighted rendezvous hashing orders the replicas for each session, the same way on every instance and host; the first one
//! that is not saturated serves it. So a session keeps its KV cache without anybody remembering where it went, and a
//! session that has to move always moves to the same second place. `route-weighted` never leaves a replica that has room in
//! its queue; `route-prefix-aware` compares the cache with the load for each request and needs no sessions.
//!
//! Saturated is a replica where `max_waiting` requests wait, or where less than `min_free_percent` of the KV blocks is free. If
//! all are, the host chooses by load. Requests without a session are spread by their seed. O(replicas), nothing allocated.
//!
//! Configuration: `max_waiting` (4), `min_free_percent` (5).

use pointsman_plugin::{Choice, HostInfo, Manifest, Micros, Policy, Replica, Replicas, Request, Router, place};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    max_waiting: u32,
    min_free_percent: u32,
}

/// The policy.
#[derive(Debug)]
pub struct Sticky {
    config: Config,
}

pointsman_plugin::router!(Sticky);

impl Default for Config {
    fn default() -> Self {
        Self { max_waiting: 4, min_free_percent: 5 }
    }
}

impl Policy for Sticky {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        if config.max_waiting == 0 || config.min_free_percent > 100 {
            return Err("max_waiting must be at least 1 and min_free_percent at most 100".to_owned());
        }
        Ok(Self { config })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!()
    }
}

impl Router for Sticky {
    fn route(&mut self, _now: Micros, request: &Request, replicas: &Replicas) -> Choice {
        let label = if request.session == 0 { request.seed } else { request.session };
        let fit = replicas.rows().filter(|r| r.in_service() && !self.is_saturated(r));
        let first = fit.map(|r| (r.health, place(label, r.key, r.weight), r.row)).min();
        first.map_or(Choice::Abstain, |(.., row)| Choice::Pick(row))
    }
}

impl Sticky {
    fn is_saturated(&self, replica: &Replica) -> bool {
        let least = u64::from(replica.total_blocks) * u64::from(self.config.min_free_percent);
        replica.waiting >= self.config.max_waiting || u64::from(replica.free_blocks) * 100 < least
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::{self, replica};

    fn route(config: &str, session: u64, rows: &[Replica]) -> Choice {
        let mut router: Sticky = testing::start(config).expect("a valid configuration");
        let request = Request { session, seed: 3, ..testing::request() };
        router.route(1, &request, &testing::replicas(rows.iter().copied()))
    }

    #[test]
    fn a_session_leaves_a_saturated_replica_alone_and_comes_back() {
        let rows = [1, 2, 3, 4].map(replica);
        let mut seconds = [0; 4];
        for session in 1..=400 {
            let Choice::Pick(home) = route("", session, &rows) else { panic!("no pick") };
            let with = |change: &dyn Fn(&mut Replica)| {
                let mut rows = rows;
                change(&mut rows[home as usize]);
                route("", session, &rows)
            };
            let busy = |r: &mut Replica| (r.waiting, r.running, r.queued_tokens) = (3, 8, 9_000);
            assert_eq!(with(&busy), Choice::Pick(home), "load alone moves nobody");
            assert_eq!(with(&|r| r.free_blocks = 50), Choice::Pick(home));
            let Choice::Pick(second) = with(&|r| r.waiting = 4) else { panic!("no pick") };
            assert_ne!(second, home);
            assert_eq!(with(&|r| r.free_blocks = 49), Choice::Pick(second), "always the same second place");
            assert_eq!(with(&|r| r.weight = 0), Choice::Pick(second));
            seconds[second as usize] += 1;
        }
        assert!(seconds.iter().all(|n| (70..=130).contains(n)), "{seconds:?}");
    }

    #[test]
    fn the_host_decides_where_all_are_saturated() {
        let full = |id| Replica { waiting: 9, ..replica(id) };
        assert_eq!(route("", 5, &[full(1), full(2)]), Choice::Abstain);
        assert!(matches!(route(r#"{"max_waiting": 10}"#, 5, &[full(1), full(2)]), Choice::Pick(_)));
        assert_eq!(route("", 5, &[]), Choice::Abstain);
    }

    #[test]
    fn nonsense_is_refused() {
        let error = testing::start::<Sticky>(r#"{"max_waiting": 0}"#).expect_err("always saturated");
        assert!(error.contains("max_waiting"), "{error}");
    }
}
