//! What the shipped policies are good for, in figures that a seed gives again: each scenario of
//! [`pointsman_tests::fleet::scenarios`] on a model of a device, with the bars that the policy has to meet.
//!
//! `cargo test --release --workspace --test sim earn -- --nocapture --test-threads 1` prints the tables, with what was refused
//! beside every figure; the benchmark `policies` prints the same for the CPU engine.

use pointsman_tests::fleet::Cost;
use pointsman_tests::fleet::scenarios::{self, Outcome, Scenario};

/// About the demo model on two cores.
const DEVICE: Cost = Cost { fixed_ns: 300_000, prefill_ns: 60_000, decode_ns: 100_000 };
/// Every bar holds for each of them.
const SEEDS: [u64; 3] = [1, 2, 3];

#[expect(clippy::print_stdout, reason = "the tables are what a reader runs this for")]
fn check(scenario: Scenario) {
    let (name, title, _) =
        scenarios::ALL.into_iter().find(|(.., other)| std::ptr::fn_addr_eq(*other, scenario)).expect("listed");
    for seed in SEEDS {
        let Outcome { figures, bars, .. } = scenario(&DEVICE, seed);
        println!("{name}: {title}, seed {seed}");
        figures.iter().for_each(|line| println!("  {line}"));
        bars.iter().for_each(|bar| println!("  {bar}"));
        for bar in &bars {
            assert!(bar.is_met(), "seed {seed}: {bar}");
        }
    }
}

#[test]
fn short_requests_need_not_wait_for_long_ones() {
    check(scenarios::shortest_first);
}

#[test]
fn critical_requests_feel_no_overload() {
    check(scenarios::priority);
}

#[test]
fn a_light_tenant_feels_no_flood() {
    check(scenarios::fair_share);
}

#[test]
fn shared_prefixes_meet_their_cache() {
    check(scenarios::prefix_aware);
}

#[test]
fn the_bandit_finds_the_faster_replica_and_finds_out_when_it_changes() {
    check(scenarios::bandit);
}

/// Where the fast replica is full, learning must not be worse than looking at the queues, which least-loaded does.
#[test]
fn the_bandit_does_not_run_from_a_full_replica() {
    for (seed, share) in SEEDS.into_iter().flat_map(|seed| [0.8, 1.0, 1.2].map(|share| (seed, share))) {
        let Outcome { bars, .. } = scenarios::bandit_at(&DEVICE, seed, share);
        for bar in bars.iter().filter(|bar| bar.what.starts_with("mean e2e")) {
            println!("seed {seed}, {share} of what the fast replica can do: {bar}");
            assert!(bar.is_met(), "seed {seed}, load {share}: {bar}");
        }
    }
}
