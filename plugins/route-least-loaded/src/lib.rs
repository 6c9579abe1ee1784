//! Router: the replica with the least work ahead of a new request.
//!
//! Work is prompt tokens accepted and not yet computed, plus a charge per sequence that waits or runs, divided by the
//! operator's weight. Exact where the replicas are alike and prompts differ; blind to the prefix cache, for which there is
//! `route-prefix-aware`. Round robin and least-connections count requests, which is wrong by a factor of a hundred between
//! a greeting and a long document. Ties go by the request's seed, so that idle replicas share the load and a decision can
//! be replayed. O(replicas), nothing allocated.
//!
//! Configuration: `sequence_tokens` (16): what one more sequence in the batch costs, in prompt tokens. A decode step
//! computes one token per sequence, and a queue of short requests is still a queue.

use pointsman_plugin::{Choice, HostInfo, Manifest, Micros, Policy, Replica, Replicas, Request, Router};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    sequence_tokens: u16,
}

/// The policy.
#[derive(Debug)]
pub struct LeastLoaded {
    config: Config,
}

pointsman_plugin::router!(LeastLoaded);

impl Default for Config {
    fn default() -> Self {
        Self { sequence_tokens: 16 }
    }
}

impl Policy for LeastLoaded {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        Ok(Self { config })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!()
    }
}

impl Router for LeastLoaded {
    fn route(&mut self, _now: Micros, request: &Request, replicas: &Replicas) -> Choice {
        let n = replicas.id.len().max(1) as u64;
        // Rows are numbered from a random one on: the first of several equals is then a random one.
        let rotated = |row: u32| (u64::from(row) + n - request.seed % n) % n;
        let in_service = replicas.rows().filter(Replica::in_service);
        let best = in_service.map(|r| (r.health, r.work(0, self.config.sequence_tokens), rotated(r.row), r.row)).min();
        best.map_or(Choice::Abstain, |(.., row)| Choice::Pick(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::{self, replica};

    fn check(config: &str, rows: &[Replica], seed: u64, expect: Choice) {
        let mut router: LeastLoaded = testing::start(config).expect("a valid configuration");
        let request = Request { seed, ..testing::request() };
        assert_eq!(router.route(1, &request, &testing::replicas(rows.iter().copied())), expect, "{rows:?}");
    }

    #[test]
    fn least_work_wins() {
        let queued = |id, queued_tokens| Replica { queued_tokens, ..replica(id) };
        check("", &[queued(1, 500), queued(2, 40), queued(3, 90)], 0, Choice::Pick(1));
        let busy = Replica { running: 3, ..replica(1) };
        check("", &[busy, queued(2, 47)], 0, Choice::Pick(1));
        check("", &[busy, queued(2, 49)], 0, Choice::Pick(0));
        check(r#"{"sequence_tokens": 1}"#, &[busy, queued(2, 47)], 0, Choice::Pick(0));
        let heavy = Replica { weight: 4_000, ..queued(1, 300) };
        check("", &[heavy, queued(2, 100)], 0, Choice::Pick(0));
    }

    #[test]
    fn drained_and_degraded_replicas_come_last() {
        let drained = Replica { weight: 0, ..replica(1) };
        let degraded = Replica { health: 1, ..replica(2) };
        let busy = Replica { queued_tokens: 9_000, ..replica(3) };
        check("", &[drained, degraded, busy], 0, Choice::Pick(2));
        check("", &[drained, degraded], 0, Choice::Pick(1));
        check("", &[drained], 0, Choice::Abstain);
        check("", &[], 0, Choice::Abstain);
    }

    #[test]
    fn ties_go_by_seed() {
        for seed in 0..6 {
            let expect = Choice::Pick(u32::try_from(seed % 3).expect("small"));
            check("", &[replica(1), replica(2), replica(3)], seed, expect);
        }
    }

    #[test]
    fn a_misspelt_option_is_named() {
        let error = testing::start::<LeastLoaded>(r#"{"sequence_token": 1}"#).expect_err("unknown");
        assert!(error.contains("unknown field `sequence_token`, expected `sequence_tokens`"), "{error}");
    }
}
