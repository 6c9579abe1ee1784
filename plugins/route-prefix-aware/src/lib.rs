//! Router: the replica that would compute the first token soonest, the prefix cache counted in.
//!
//! The time to the first token is, in tokens, what a replica has queued plus what it has not cached of this prompt: both in
//! one unit, so a long cached prefix outweighs a queue exactly when recomputing it would take longer than waiting. Routers
//! with a cache threshold and a separate balance threshold (SGLang's cache-aware mode) approximate the same comparison with
//! two knobs; counting exploitation against load in one cost is the idea of Preble (Srivatsa et al., "Efficient Distributed
//! Prompt Scheduling for LLM Serving", ICLR 2025).
//!
//! Where nobody has the prefix and costs are nearly equal, requests that share their first block should still meet: among
//! the replicas within `slack_tokens` of the best, rendezvous hashing of the first block decides. Without it a new prefix
//! would be computed once per replica. A slack that is too large makes a popular prefix a hot spot of that size.
//!
//! Configuration: `cached_percent` (100): what a cached token counts; lower it where cached blocks are often evicted before
//! they are used. `sequence_tokens` (16): what one more sequence in the batch costs. `slack_tokens` (64).

use pointsman_plugin::{Choice, HostInfo, Manifest, Micros, Policy, Replica, Replicas, Request, Router, mix};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    cached_percent: u32,
    sequence_tokens: u16,
    slack_tokens: u32,
}

/// The policy.
#[derive(Debug)]
pub struct PrefixAware {
    config: Config,
}

pointsman_plugin::router!(PrefixAware);

impl Default for Config {
    fn default() -> Self {
        Self { cached_percent: 100, sequence_tokens: 16, slack_tokens: 64 }
    }
}

impl Policy for PrefixAware {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        if config.cached_percent > 100 {
            return Err(format!("cached_percent is a share of 100, not {}", config.cached_percent));
        }
        Ok(Self { config })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!()
    }
}

impl Router for PrefixAware {
    fn route(&mut self, _now: Micros, request: &Request, replicas: &Replicas) -> Choice {
        let candidates =
            || replicas.rows().filter(Replica::in_service).map(|r| ((r.health, self.cost(request, &r)), r));
        let Some((health, least)) = candidates().map(|(cost, _)| cost).min() else { return Choice::Abstain };
        let bound = (health, least.saturating_add(u64::from(self.config.slack_tokens)));
        // A request without a whole first block has nothing to share: its own bits spread it.
        let label = if request.prefix == 0 { request.seed } else { request.prefix };
        let near = candidates().filter(|(cost, _)| *cost <= bound);
        let best = near.max_by_key(|(_, replica)| mix(label, replica.key));
        best.map_or(Choice::Abstain, |(_, replica)| Choice::Pick(replica.row))
    }
}

impl PrefixAware {
    /// Tokens to compute before this request's first one, per normal weight.
    fn cost(&self, request: &Request, replica: &Replica) -> u64 {
        let cached = u64::from(replica.cached_tokens) * u64::from(self.config.cached_percent) / 100;
        let own = u64::from(request.prompt_tokens).saturating_sub(cached);
        replica.work(own, self.config.sequence_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::{self, replica};

    fn pick(config: &str, request: &Request, rows: &[Replica]) -> Choice {
        let mut router: PrefixAware = testing::start(config).expect("a valid configuration");
        router.route(1, request, &testing::replicas(rows.iter().copied()))
    }

    #[test]
    fn a_cached_prefix_is_worth_its_tokens_and_no_more() {
        let request = Request { prompt_tokens: 1_000, ..testing::request() };
        let holder = |queued_tokens| Replica { cached_tokens: 800, queued_tokens, ..replica(1) };
        for (config, queued, expect) in [
            ("", 0, 0),
            ("", 700, 0),
            ("", 900, 1),
            (r#"{"cached_percent": 50}"#, 300, 0),
            (r#"{"cached_percent": 50}"#, 500, 1),
        ] {
            assert_eq!(
                pick(config, &request, &[holder(queued), replica(2)]),
                Choice::Pick(expect),
                "{config} {queued}"
            );
        }
        let degraded = Replica { health: 1, ..holder(0) };
        assert_eq!(pick("", &request, &[degraded, replica(2)]), Choice::Pick(1));
        assert_eq!(pick("", &request, &[Replica { weight: 0, ..holder(0) }]), Choice::Abstain);
    }

    #[test]
    fn equal_prefixes_meet_while_loads_are_near() {
        let rows = [1, 2, 3, 4].map(replica);
        let mut hits = [0; 4];
        for prefix in 1..=400 {
            let request = Request { prefix, ..testing::request() };
            let Choice::Pick(row) = pick("", &request, &rows) else { panic!("no pick") };
            hits[row as usize] += 1;
            let mut busier = rows;
            busier[row as usize].queued_tokens = 60;
            assert_eq!(pick("", &request, &busier), Choice::Pick(row), "within the slack");
            busier[row as usize].queued_tokens = 70;
            assert_ne!(pick("", &request, &busier), Choice::Pick(row), "beyond the slack");
        }
        assert!(hits.iter().all(|n| (70..=130).contains(n)), "{hits:?}");
    }

    #[test]
    fn nonsense_is_refused() {
        let error = testing::start::<PrefixAware>(r#"{"cached_percent": 150}"#).expect_err("too much");
        assert!(error.contains("150"), "{error}");
    }
}
