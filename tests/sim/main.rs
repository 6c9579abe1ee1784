//! Seeded simulation of one replica: the real scheduler, a model executor with a cost model, a virtual clock, and policies
//! from helpful to hostile, native ones and WebAssembly guests in the real runtime. Weeks of traffic pass in seconds, and
//! every history can be had again from its seed.
//!
//! Read in this order: [`world`] (what happens when, and `run`), [`checks`] (what must hold after every step),
//! [`executor`] (how wrong KV becomes a wrong answer), [`policies`] and [`retention`] (who proposes), [`guests`] and
//! [`operator`] (the same through components, swapped at any moment). A seed that failed once goes into `seeds.txt` with a
//! word on why; every sweep runs it for ever. [`earn`] is another kind of test: what the shipped policies are good for, in
//! figures.
//!
//! Not a fuzzer of bytes: what breaks schedulers is an order of events, and a world that knows what a request, a fault and
//! a swap are reaches those orders sooner.

mod checks;
mod earn;
mod executor;
mod guests;
mod late;
mod operator;
mod policies;
mod retention;
mod world;

use guests::{Cast, Guest, Role};
use late::{Lateness, run_late};
use operator::{Tally, run_guests};
use pointsman_tests::rng;
use policies::Kind;
use world::{Options, Report, run};

/// Seeds of the sweep, besides those of `seeds.txt`.
const SWEEP: std::ops::Range<u64> = 0..300;
/// The same for guests, which cost more.
const GUEST_SWEEP: std::ops::Range<u64> = 0..150;

fn regressions() -> Vec<u64> {
    let lines = include_str!("seeds.txt").lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).map(|line| line.parse().expect("a seed per line")).collect()
}

/// Runs every seed with one kind of policy and adds up the reports, so that a test can also say what the seeds reached.
fn sweep(kind: Kind, shape: impl Fn(Options) -> Options) -> Report {
    let mut total = Report::default();
    for seed in regressions().into_iter().chain(SWEEP) {
        let options = shape(Options::of_seed(seed));
        total.add(&run(seed, kind.policy(seed), &options));
    }
    total
}

/// The same with guests, in worlds so slow that circuits have time to close again.
fn sweep_guests(cast: Cast, shape: impl Fn(Options) -> Options) -> (Report, Tally) {
    let (mut total, mut tally) = (Report::default(), Tally::default());
    for seed in regressions().into_iter().chain(GUEST_SWEEP) {
        let (report, of_guests) = run_guests(seed, cast, &shape(slow(seed)));
        total.add(&report);
        tally.add(&of_guests);
    }
    (total, tally)
}

fn slow(seed: u64) -> Options {
    let options = Options::of_seed(seed);
    Options { n_requests: 250, gap_us: 4 * options.gap_us, ..options }
}

#[test]
fn the_native_policy_serves_everything() {
    let total = sweep(Kind::Native, |options| options);
    assert!(total.preemptions > 0 && total.cached_tokens > 0 && total.failed > 0 && total.cancelled > 0, "{total:?}");
    assert!(total.rankings > 1_000 && total.rankings_refused > 10, "{total:?}");
    assert_eq!(total.policy_calls, 0);
}

#[test]
fn shortest_first_serves_everything() {
    let total = sweep(Kind::ShortestFirst, |options| options);
    assert!(total.preemptions > 0 && total.policy_calls > 0, "{total:?}");
    assert_eq!((total.plans_refused, total.dropped), (0, 0), "it names only what it was shown");
}

#[test]
fn no_adversary_breaks_the_books() {
    let total = sweep(Kind::Adversary, |options| options);
    assert!(total.plans_refused > 0 && total.dropped > 0 && total.overdue_served > 0, "{total:?}");
}

#[test]
fn a_policy_that_holds_everything_costs_the_starvation_bound_and_no_more() {
    let total = sweep(Kind::HoldsAll, |options| Options { cancel_ppm: 0, fault_ppm: 0, deadline_ppm: 0, ..options });
    assert_eq!(total.finished, total.submitted, "{total:?}");
    assert!(total.overdue_served > 0, "{total:?}");
}

#[test]
fn swaps_in_mid_flight_never_split_a_decision() {
    let total = sweep(Kind::Native, |options| Options { swap_ppm: 50_000, ..options });
    assert!(total.swaps > 100 && total.policy_calls > 0, "{total:?}");
}

#[test]
fn without_faults_and_cancels_every_request_finishes() {
    for kind in [Kind::Native, Kind::ShortestFirst] {
        let total = sweep(kind, |options| Options { cancel_ppm: 0, fault_ppm: 0, deadline_ppm: 0, ..options });
        assert_eq!(total.finished, total.submitted, "{kind:?} {total:?}");
    }
}

#[test]
fn steps_planned_ahead_change_no_answer() {
    for kind in Kind::ALL {
        let total = sweep(kind, |options| Options { ahead: true, ..options });
        println!("{kind:?}: {} of {} steps were planned ahead", total.steps_ahead, total.steps);
        assert!(total.steps_ahead > total.steps / 20, "{kind:?} {total:?}");
        assert!(total.preemptions > 0 && total.failed > 0 && total.cancelled > 0, "{kind:?} {total:?}");
    }
}

#[test]
fn drafts_change_no_answer() {
    // With faults, cancels, preemptions and whatever a policy says; each answer is what the request alone would have got.
    for kind in Kind::ALL {
        let total = sweep(kind, |options| Options { drafts: true, ..options });
        println!("{kind:?}: {} of {} drafts came true, {} steps", total.accepted, total.drafted, total.steps);
        assert!(total.drafted > 1_000 && total.preemptions + total.failed + total.cancelled > 100, "{total:?}");
        assert!(total.accepted > total.drafted / 4 && total.accepted < total.drafted, "{total:?}");
    }
}

#[test]
fn a_seed_gives_the_same_history_twice() {
    for seed in SWEEP.take(5) {
        let options = Options { swap_ppm: 20_000, ..Options::of_seed(seed) };
        let report = || run(seed, Kind::Adversary.policy(seed), &options);
        assert_eq!(report(), report());
    }
}

#[test]
fn pins_keep_a_system_prompt_that_least_recent_use_loses() {
    let [lru, pinned] = retention::hit_rates();
    println!(
        "prompt tokens found in the cache: {:.1} % least recently used, {:.1} % pinned",
        100.0 * lru,
        100.0 * pinned
    );
    assert!(lru < 0.01, "the job in between is larger than the cache: {lru}");
    // 512 of 576 tokens, from the second turn on.
    assert!(pinned > 0.85, "{pinned}");
}

#[test]
fn good_guests_serve_everything() {
    let (total, tally) = sweep_guests(Cast::Good, |options| options);
    assert!(total.preemptions > 0 && total.cached_tokens > 0 && total.failed > 0 && total.cancelled > 0, "{total:?}");
    assert_eq!((total.plans_refused, total.dropped, tally.faults), (0, 0, [0; 5]), "{tally:?}");
    assert!(tally.plans > 1_000 && tally.swaps > 100 && tally.overtaken > 10 && tally.respawns > 0, "{tally:?}");
}

#[test]
fn no_guest_breaks_the_books() {
    let (total, tally) = sweep_guests(Cast::Any, |options| options);
    assert_eq!(total.dropped, 0, "{total:?}");
    assert!(total.plans_refused > 0 && total.overdue_served > 0, "{total:?}");
    let [timeout, trap, memory, bad_answer, link] = tally.faults;
    assert_eq!((timeout, memory, link), (0, 0, 0), "{tally:?}");
    assert!(trap > 10 && bad_answer > 10 && tally.fallbacks > 0, "{tally:?}");
    assert!(tally.opened > 10 && tally.closed > 10 && tally.respawns > 10, "{tally:?}");
    assert!(tally.swaps > 100 && tally.overtaken > 10 && tally.refused > 10, "{tally:?}");
}

#[test]
fn whatever_guests_do_every_request_finishes() {
    let calm = |options| Options { cancel_ppm: 0, fault_ppm: 0, deadline_ppm: 0, ..options };
    let (total, tally) = sweep_guests(Cast::Any, calm);
    assert_eq!(total.finished, total.submitted, "{total:?} {tally:?}");
}

#[test]
fn a_seed_gives_the_same_history_twice_with_guests() {
    for seed in GUEST_SWEEP.take(6) {
        let history = || run_guests(seed, Cast::Any, &slow(seed));
        assert_eq!(history(), history(), "seed {seed}");
    }
}

#[test]
fn plans_that_come_late_name_nobody_who_is_unknown() {
    let roles = [(Guest::Fcfs, "{}"), (Guest::ShortestFirst, "{}"), (Guest::Priority, r#"{"preempt": true}"#)];
    for (guest, config) in roles {
        let role = Role { guest, config: config.into(), starts: true };
        let (mut total, mut late_plans, mut fallbacks) = (Report::default(), 0, 0);
        for seed in regressions().into_iter().chain(GUEST_SWEEP.take(60)) {
            let (report, lateness) = run_late(seed, &role, &slow(seed));
            assert_eq!(lateness.faults, 0, "seed {seed}: {lateness:?}");
            total.add(&report);
            (late_plans, fallbacks) = (late_plans + lateness.late_plans, fallbacks + lateness.fallbacks);
        }
        assert_eq!((total.plans_refused, total.dropped), (0, 0), "{guest:?} {total:?}");
        assert!(total.preemptions > 0 && total.cancelled > 0 && total.failed > 0, "{guest:?} {total:?}");
        assert!(late_plans > 500 && fallbacks > 500, "{guest:?}: {late_plans} late, {fallbacks} native");
    }
}

#[test]
fn whatever_a_guest_does_late_every_request_finishes() {
    let (mut faults, mut refused) = (0, 0);
    for seed in GUEST_SWEEP.take(60) {
        let deed = ["trap", "unknown-id", "duplicate-id", "uneven-lists", "starve", "no-plan"][seed as usize % 6];
        let config = format!(r#"{{"do": "{deed}", "after": {}}}"#, 12 + seed % 8);
        let role = Role { guest: Guest::Fixture, config, starts: true };
        let calm = Options { cancel_ppm: 0, fault_ppm: 0, deadline_ppm: 0, ..slow(seed) };
        let history = || run_late(seed, &role, &calm);
        let (report, Lateness { faults: of_guest, .. }) = history();
        assert_eq!(report.finished, report.submitted, "seed {seed} {deed}: {report:?}");
        (faults, refused) = (faults + of_guest, refused + report.plans_refused);
        if seed % 10 == 0 {
            assert_eq!(history().0, report, "seed {seed}: the same history twice");
        }
    }
    assert!(faults > 30 && refused > 15, "{faults} faults, {refused} refused plans");
}
