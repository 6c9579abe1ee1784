//! Router: learns from outcomes which replica serves fastest.
//!
//! `hook-outcomes` keeps, per replica, what requests cost there of late; this policy draws a plausible mean cost for each
//! replica and takes the smallest (Thompson, 1933; Chapelle and Li, "An Empirical Evaluation of Thompson Sampling", NIPS
//! 2011). A replica that is surely slower is hardly asked; one of which little is known is asked now and then, which is how
//! it is found out. As its outcomes fade, it is asked again.
//!
//! The draw is a normal one around the mean with its standard error, after one imagined outcome at the mean of all replicas
//! with an error as large as itself. It comes out of the request's seed and the replica's key, so a decision can be
//! replayed. Outcomes say how slow a replica is and not how much it has to do; that the columns say, and it is now: a request
//! is served the slower the more are in its batch, and where the batch is full it waits for as many turns as there are
//! batches before it. So a burst spreads before its outcomes are known. Until there are outcomes, the host decides.
//!
//! Both policies must be told the same namespace: `"state_namespace": "outcomes"` in the activation of this router and of the
//! hook. The table is read once in `refresh_ms` by each instance, not for every request.
//!
//! Configuration: `refresh_ms` (100), `explore_percent` (100): the width of the draws, 0 for none.

use outcomes::{KEY, Outcome, STATE_SCHEMA, Table, crowding};
use pointsman_plugin::{Choice, HostInfo, Manifest, Micros, Policy, Replica, Replicas, Request, Router, mix, state};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    refresh_ms: u32,
    explore_percent: u32,
}

/// The policy.
#[derive(Debug)]
pub struct Bandit {
    config: Config,
    table: Table,
    /// Mean cost over all replicas; 0 before any outcome.
    prior: f64,
    /// When the table is read again.
    stale_at: Micros,
}

pointsman_plugin::router!(Bandit);

impl Default for Config {
    fn default() -> Self {
        Self { refresh_ms: 100, explore_percent: 100 }
    }
}

impl Policy for Bandit {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        Ok(Self { config, table: Table::default(), prior: 0.0, stale_at: 0 })
    }

    fn manifest(&self) -> Manifest {
        Manifest { state_schema: STATE_SCHEMA, ..pointsman_plugin::manifest!() }
    }
}

impl Router for Bandit {
    fn route(&mut self, now: Micros, request: &Request, replicas: &Replicas) -> Choice {
        if now >= self.stale_at {
            self.refresh(now);
        }
        if self.prior <= 0.0 {
            return Choice::Abstain;
        }
        let in_service = replicas.rows().filter(Replica::in_service);
        // Costs are positive, and the bits of a positive float sort like the float.
        let best = in_service.map(|r| (r.health, self.cost(request.seed, &r).to_bits(), r.row)).min();
        best.map_or(Choice::Abstain, |(.., row)| Choice::Pick(row))
    }
}

impl Bandit {
    fn refresh(&mut self, now: Micros) {
        self.stale_at = now + u64::from(self.config.refresh_ms) * 1_000;
        self.table = state::get(KEY).map(|bytes| Table::decode(&bytes)).unwrap_or_default();
        let (n, sum) = self.table.rows().iter().fold((0.0, 0.0), |(n, sum), row| (n + row.n, sum + row.n * row.mean));
        self.prior = if n > 0.0 { sum / n } else { 0.0 };
    }

    /// What this request would plausibly cost there, per normal weight.
    fn cost(&self, seed: u64, replica: &Replica) -> f64 {
        let unknown = Outcome { replica: replica.id, ..Outcome::default() };
        let known = self.table.get(replica.id).unwrap_or(&unknown);
        let n = known.n + 1.0;
        let mean = (known.n * known.mean + self.prior) / n;
        let off = known.mean - self.prior;
        let squares = known.squares + off * off * known.n / n + self.prior * self.prior;
        let error = squares.sqrt() / n * f64::from(self.config.explore_percent) / 100.0;
        let drawn = (mean + error * normal(mix(seed, replica.key))).max(self.prior / 1_000.0);
        let limit = replica.running_limit.max(1);
        let sequences = replica.running.saturating_add(replica.waiting).saturating_add(1);
        let turns = (f64::from(sequences) / f64::from(limit)).max(1.0);
        drawn * crowding(sequences.min(limit)) * turns / f64::from(replica.weight.max(1))
    }
}

/// Nearly a standard normal number out of random bits: the sum of four uniform ones, within 3.5 of 0.
fn normal(bits: u64) -> f64 {
    let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    (sum as f64 / 65_536.0 - 2.0) * 3_f64.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::{self, replica};

    /// How often each of two replicas is chosen out of 2,000 times, knowing `n` outcomes of each with these costs.
    fn picks(config: &str, outcomes: [(u32, f64); 2], rows: [Replica; 2]) -> [u32; 2] {
        let mut table = Table::default();
        for (replica, (n, cost)) in (1..).zip(outcomes) {
            // A spread of a tenth around the mean.
            (0..n).for_each(|i| table.add(replica, cost * (0.9 + 0.2 * f64::from(i % 2))));
        }
        state::set(KEY, &table.encode()).expect("room");
        let mut router: Bandit = testing::start(config).expect("a valid configuration");
        let mut picks = [0; 2];
        for seed in 0..2_000 {
            let request = Request { seed, ..testing::request() };
            match router.route(1_000, &request, &testing::replicas(rows)) {
                Choice::Pick(row) => picks[row as usize] += 1,
                other => panic!("{other:?}"),
            }
        }
        picks
    }

    #[test]
    fn the_faster_one_is_taken_and_the_unknown_one_is_tried() {
        let rows = [1, 2].map(replica);
        for (outcomes, share_of_second) in [
            ([(100, 30.0), (100, 10.0)], 2_000..=2_000),
            ([(100, 10.0), (100, 10.0)], 850..=1_150),
            // Little is known of the slower one: it is asked, though not often.
            ([(100, 10.0), (1, 30.0)], 100..=400),
            ([(100, 10.0), (0, 0.0)], 700..=1_100),
        ] {
            let [_, second] = picks("", outcomes, rows);
            assert!(share_of_second.contains(&second), "{outcomes:?}: {second}");
        }
        let greedy = picks(r#"{"explore_percent": 0}"#, [(100, 10.0), (1, 30.0)], rows);
        assert_eq!(greedy, [2_000, 0]);
    }

    #[test]
    fn a_queue_drained_replicas_and_health_count() {
        let outcomes = [(100, 10.0), (100, 15.0)];
        let [first, second] = [1, 2].map(replica);
        for (busy, first_wins) in [
            (Replica { running: 1, ..first }, true),
            (Replica { running: 7, ..first }, false),
            (Replica { running: 8, waiting: 8, ..first }, false),
        ] {
            let picks = picks("", outcomes, [busy, second]);
            assert_eq!(picks[0] > 1_900, first_wins, "{busy:?}: {picks:?}");
            assert_eq!(picks[1] > 1_900, !first_wins, "{busy:?}: {picks:?}");
        }
        assert_eq!(picks("", outcomes, [Replica { weight: 0, ..first }, second]), [0, 2_000]);
        assert_eq!(picks("", outcomes, [Replica { health: 1, ..first }, second]), [0, 2_000]);
    }

    #[test]
    fn the_host_decides_until_there_are_outcomes_and_reads_are_bounded() {
        state::delete(KEY);
        let mut router: Bandit = testing::start("").expect("a valid configuration");
        let mut route = |now| router.route(now, &testing::request(), &testing::replicas([replica(1)]));
        assert_eq!(route(1), Choice::Abstain);
        let mut table = Table::default();
        table.add(1, 5.0);
        state::set(KEY, &table.encode()).expect("room");
        assert_eq!((route(100_000), route(100_001)), (Choice::Abstain, Choice::Pick(0)));
    }

    #[test]
    fn draws_are_nearly_normal() {
        let draws: Vec<f64> = (0..20_000).map(|seed| normal(mix(seed, 9))).collect();
        let mean = |f: &dyn Fn(f64) -> f64| draws.iter().map(|&x| f(x)).sum::<f64>() / 20_000.0;
        let (mean, variance, beyond_two) = (mean(&|x| x), mean(&|x| x * x), mean(&|x| f64::from(x > 2.0)));
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        assert!((0.015..0.03).contains(&beyond_two), "{beyond_two}");
    }
}
