//! What must be shown before anybody trusts a rollout: thousands of simulated ones, with seeds, and their figures printed.
//!
//! Blocks are autocorrelated like a real host's: load and latency drift together (an AR(1) process over blocks), and requests
//! of a block share its luck. So the simulations would catch a rule that takes requests for independent.

use pointsman_telemetry::{Event, EventKind, Micros};

use super::assign::{Arm, Random, blocks};
use super::ledger::{ArmPeriod, Period, Split, Sums};
use super::stats::Moments;
use super::{Answers, Cause, Command, Decision, Hold, Metric, Mode, Phase, Rollout, RolloutDocument, Spec};
use crate::journal::{Entry, Happened, Journal};

impl Random {
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Nearly normal: a sum of four uniforms, scaled to variance 1.
    fn normal(&mut self) -> f64 {
        ((0..4).map(|_| self.unit()).sum::<f64>() - 2.0) * 3.0_f64.sqrt()
    }
}

/// A host under drifting load.
struct World {
    random: Random,
    /// Load: autocorrelated from block to block.
    drift: f64,
    /// P(TTFT > SLO) of control at mean load, and what the candidate adds.
    over: f64,
    added: f64,
    /// Whether requests are split between variants, and not time between policies.
    split: bool,
}

impl World {
    fn new(seed: u64, over: f64, added: f64) -> Self {
        Self { random: Random(seed), drift: 0.0, over, added, split: false }
    }

    /// Luck and number of the requests of a block.
    fn weather(&mut self) -> (f64, u64) {
        self.drift = 0.8 * self.drift + 0.2 * self.random.normal();
        let luck = (self.drift + 0.15 * self.random.normal()).exp();
        (luck, (30.0 * self.drift.exp() + 6.0 * self.random.normal()).max(3.0) as u64)
    }

    fn requests(&mut self, arm: Arm, (luck, offered): (f64, u64)) -> Sums {
        let added = if arm == Arm::Candidate { self.added } else { 0.0 };
        let mut sums = Sums { offered, ..Sums::default() };
        for _ in 0..offered {
            if self.random.unit() < 0.01 * luck {
                sums.rejected += 1;
                continue;
            }
            if self.random.unit() < 0.003 {
                sums.failed += 1;
                continue;
            }
            sums.ttft_n += 1;
            sums.ttft_over += u64::from(self.random.unit() < (self.over * luck + added).min(1.0));
            sums.itl_n += 1;
            sums.itl_over += u64::from(self.random.unit() < 0.05 * luck);
            sums.e2e_n += 1;
            sums.e2e_us += (400_000.0 * luck * (0.5 + self.random.unit())) as u64;
        }
        sums
    }

    /// One block of time whose requests are split; each is a unit.
    fn split_period(&mut self, number: u64, percent: u8) -> Period {
        let (luck, offered) = self.weather();
        let share = i64::from(percent);
        let mine = (0..offered).filter(|_| self.random.unit() < share as f64 / 100.0).count() as u64;
        let mut of = |arm, n| ArmPeriod::of(20_000, [self.requests(arm, (luck, n))].iter());
        let (control, candidate) = (of(Arm::Control, offered - mine), of(Arm::Candidate, mine));
        let n = offered as i64;
        let units =
            Moments { n: offered, sum: mine as i64 * 1_000 - n * share * 10, squares: n * share * (100 - share) * 100 };
        Period {
            number,
            percent,
            took_ms: 20_000,
            incomplete: false,
            control,
            candidate,
            units: Some(units),
            shadow: None,
        }
    }

    fn period(&mut self, document: &RolloutDocument) -> Period {
        let (number, percent) = (document.progress.next_period, document.percent());
        if self.split {
            return self.split_period(number, percent);
        }
        let mut block = |arm| {
            let weather = self.weather();
            self.requests(arm, weather)
        };
        let placed: Vec<(Arm, Sums)> =
            blocks(document.spec.seed, number, percent).into_iter().map(|arm| (arm, block(arm))).collect();
        let of = |arm: Arm| {
            let mine = placed.iter().filter(move |(a, _)| *a == arm).map(|(_, sums)| sums);
            ArmPeriod::of(mine.clone().count() as u64 * 20_000, mine)
        };
        Period {
            number,
            percent,
            took_ms: placed.len() as u64 * 20_000,
            incomplete: false,
            control: of(Arm::Control),
            candidate: of(Arm::Candidate),
            units: None,
            shadow: None,
        }
    }
}

fn document(spec: Spec) -> RolloutDocument {
    assert_eq!(spec.check(), Ok(()));
    RolloutDocument::new("r1".into(), "router".into(), ["a@1".into(), "b@1".into()], spec)
}

/// How one simulated rollout ended, and after how many blocks.
struct Ended {
    aborted_for: Option<Metric>,
    promoted: bool,
    blocks: u64,
}

fn run(spec: Spec, mut world: World, max_periods: u64) -> Ended {
    let mut document = document(spec);
    let mut blocks = 0;
    for _ in 0..max_periods {
        let period = world.period(&document);
        blocks += period.control.n_blocks + period.candidate.n_blocks;
        document.observe(&period);
        if document.phase != Phase::Running {
            break;
        }
    }
    let aborted_for = match document.phase {
        Phase::Aborted { cause: Cause::Guard { metric } } => Some(metric),
        _ => None,
    };
    Ended { aborted_for, promoted: document.phase == Phase::Promoted, blocks }
}

fn with_margin(mut spec: Spec, margin: f64) -> Spec {
    spec.guards.iter_mut().for_each(|guard| guard.margin = margin);
    spec
}

/// Clopper and Pearson: the true share is below this, but for one chance in twenty.
fn upper_bound(found: u64, of: u64) -> f64 {
    let at_most = |p: f64| {
        let mut term = (of as f64 * (1.0 - p).ln()).exp();
        let mut sum = term;
        for k in 0..found {
            term *= (of - k) as f64 / (k + 1) as f64 * p / (1.0 - p);
            sum += term;
        }
        sum
    };
    let (mut low, mut high) = (found as f64 / of as f64, 0.5);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if at_most(middle) > 0.05 { low = middle } else { high = middle }
    }
    high
}

fn quantile(sorted: &[u64], q: f64) -> u64 {
    sorted[((sorted.len() - 1) as f64 * q) as usize]
}

#[test]
fn two_equal_policies_are_told_apart_less_often_than_alpha() {
    // No margin at all: the hardest case, where any certain difference aborts.
    for (name, spec, periods) in [
        ("switchback, 500 pairs of blocks", Spec::of(Mode::Switchback, 7), 500),
        ("canary at 10 %, 100 periods of 10 blocks", Spec { steps: vec![10], ..Spec::of(Mode::Canary, 7) }, 100),
    ] {
        let spec = with_margin(spec, 0.0);
        let aborted = |seed: u64| {
            let spec = Spec { seed: seed.wrapping_mul(0x1234_5677), ..spec.clone() };
            run(spec, World::new(seed, 0.10, 0.0), periods).aborted_for.is_some()
        };
        let false_aborts = (1..=1_000).filter(|seed| aborted(*seed)).count() as u64;
        let bound = upper_bound(false_aborts, 1_000);
        println!(
            "A/A, {name}: {false_aborts} false aborts of 1000 at alpha 0.05 (exact 95 % upper bound {:.2} %)",
            bound * 100.0
        );
        assert!(bound <= 0.05, "{name}: {false_aborts} false aborts, bound {bound}");
    }
}

#[test]
fn two_equal_variants_are_told_apart_less_often_than_alpha_and_a_worse_one_is_caught() {
    let variants = |seed: u64, added| World { split: true, ..World::new(seed, 0.10, added) };
    for (name, spec) in [
        ("ab between variants, 500 blocks", Spec::of(Mode::Ab, 7)),
        ("canary between variants at 10 %, 500 blocks", Spec { steps: vec![10], ..Spec::of(Mode::Canary, 7) }),
    ] {
        let ended: Vec<Ended> =
            (1..=4_000).map(|seed| run(with_margin(spec.clone(), 0.0), variants(seed, 0.0), 500)).collect();
        let false_aborts = ended.iter().filter(|e| e.aborted_for.is_some()).count() as u64;
        let bound = upper_bound(false_aborts, 4_000);
        println!(
            "A/A, {name}: {false_aborts} false aborts of 4000 at alpha 0.05 (exact 95 % upper bound {:.2} %)",
            bound * 100.0
        );
        assert!(bound <= 0.05, "{name}: {false_aborts} false aborts, bound {bound}");
        let ended: Vec<Ended> = (1..=200).map(|seed| run(spec.clone(), variants(seed, 0.20), 500)).collect();
        let mut blocks: Vec<u64> =
            ended.iter().filter(|e| e.aborted_for == Some(Metric::TtftOverSlo)).map(|e| e.blocks / 2).collect();
        blocks.sort_unstable();
        let (caught, half, most) = (blocks.len(), quantile(&blocks, 0.5), quantile(&blocks, 0.95));
        println!(
            "regression, P(TTFT > SLO) 0.10 -> 0.30, {name}: caught in {caught} of 200 runs, after {half} blocks (median), {most} (95th percentile)"
        );
        assert!(caught >= 190, "{name}: {caught}");
    }
    // The sample-ratio check looks at every period, and is wrong in few of a thousand rollouts that are what they say.
    let held = |seed: u64| {
        let (mut world, mut document) = (variants(seed, 0.0), document(Spec::of(Mode::Ab, seed)));
        (0..100).any(|_| {
            document.observe(&world.period(&document));
            document.progress.holds.contains(&Hold::SampleRatio)
        })
    };
    let held = (1..=1_000).filter(|seed| held(*seed)).count();
    println!("sample ratio, ab between variants, 100 looks: {held} of 1000 held for a while");
    assert!(held <= 30, "{held}");
}

#[test]
fn an_equal_candidate_is_promoted_through_every_step() {
    let spec = Spec { auto_promote: true, ..Spec::of(Mode::Canary, 7) };
    let ended: Vec<Ended> =
        (1..=100).map(|seed| run(Spec { seed, ..spec.clone() }, World::new(seed, 0.10, 0.0), 2_000)).collect();
    let promoted = ended.iter().filter(|e| e.promoted).count();
    let mut blocks: Vec<u64> = ended.iter().map(|e| e.blocks).collect();
    blocks.sort_unstable();
    let (half, most) = (quantile(&blocks, 0.5), quantile(&blocks, 0.95));
    println!(
        "A/A, canary 1-5-10-25-50-100 with the default margins: {promoted} of 100 promoted, after {half} blocks (median), {most} (95th percentile)"
    );
    assert!(promoted >= 95, "{promoted}");
}

#[test]
fn an_injected_regression_is_caught() {
    let canary = Spec { auto_promote: true, ..Spec::of(Mode::Canary, 7) };
    let even = |margin| with_margin(Spec::of(Mode::Switchback, 7), margin);
    for (name, spec, over, added, periods) in [
        ("P(TTFT > SLO) 0.10 -> 0.30, canary with its defaults", canary, 0.10, 0.20, 400),
        ("P(TTFT > SLO) 0.10 -> 0.30, switchback with its defaults", Spec::of(Mode::Switchback, 7), 0.10, 0.20, 400),
        ("P(TTFT > SLO) 0.25 -> 0.30 (a fifth more), switchback, no margin", even(0.0), 0.25, 0.05, 600),
    ] {
        let ended: Vec<Ended> =
            (1..=200).map(|seed| run(Spec { seed, ..spec.clone() }, World::new(seed, over, added), periods)).collect();
        let mut blocks: Vec<u64> =
            ended.iter().filter(|e| e.aborted_for == Some(Metric::TtftOverSlo)).map(|e| e.blocks).collect();
        blocks.sort_unstable();
        let caught = blocks.len();
        let (half, most) = (quantile(&blocks, 0.5), quantile(&blocks, 0.95));
        println!(
            "regression, {name}: caught in {caught} of 200 runs, after {half} blocks (median), {most} (95th percentile)"
        );
        assert!(caught >= 190, "{name}: {caught}");
    }
}

/// A host that is driven by the clock: requests as events, commands carried out, everything journalled.
struct Driven {
    rollout: Rollout,
    journal: Journal,
    random: Random,
    now: Micros,
    next_request: u64,
    /// Requests under way: when they end.
    running: Vec<(Micros, u64, Micros)>,
    served: Vec<Arm>,
}

/// Between two ticks.
const TICK_US: Micros = 50_000;
/// Lines that the journal keeps here.
const LINES: usize = 4_096;

impl Driven {
    fn new(spec: Spec, seed: u64) -> Self {
        let document = document(spec);
        let mut journal = Journal::new(LINES, 0);
        let rollout = Box::new(document.clone());
        journal.append(0, "admin", Happened::RolloutStarted { rollout });
        Self {
            rollout: Rollout::new(document, Split::Time { generations: None }),
            journal,
            random: Random(seed),
            now: 1,
            next_request: 1,
            running: Vec::new(),
            served: Vec::new(),
        }
    }

    fn carry_out(&mut self, commands: Vec<Command>, actor: &str) {
        for command in commands {
            let document = self.rollout.document().clone();
            let (id, subject) = (document.id.clone(), document.subject.clone());
            match command {
                Command::Serve(arm) => {
                    self.rollout.served(self.now);
                    self.served.push(arm);
                }
                Command::Observed(period) => {
                    self.journal.append(self.now, actor, Happened::RolloutObserved { id, subject, period });
                }
                Command::Decided(decision) => {
                    let evidence = Box::new(document.evidence());
                    self.journal.append(self.now, actor, Happened::RolloutDecided { id, subject, decision, evidence });
                }
            }
        }
    }

    /// Fifty milliseconds: a few requests arrive, some end, the rollout looks.
    fn step(&mut self, slow: f64) {
        self.now += TICK_US;
        let candidate = self.rollout.serving() == Arm::Candidate;
        for _ in 0..self.random.next() % 3 {
            let request = self.next_request;
            self.next_request += 1;
            let event = Event { request, prompt_tokens: 9, ..Event::new(self.now, EventKind::Admitted) };
            self.rollout.note(&event, &mut |_| {});
            let factor = if candidate { slow } else { 1.0 };
            let ttft = (30_000.0 * factor * (0.5 + self.random.unit())) as Micros;
            self.rollout
                .note(&Event { request, a: ttft, ..Event::new(self.now + ttft, EventKind::FirstToken) }, &mut |_| {});
            self.running.push((self.now + ttft + 200_000, request, self.now));
        }
        let now = self.now;
        for (at, request, admitted) in self.running.extract_if(.., |(at, ..)| *at <= now) {
            self.rollout
                .note(&Event { request, a: at - admitted, b: 20, ..Event::new(at, EventKind::Finished) }, &mut |_| {});
        }
        let commands = self.rollout.tick(self.now);
        self.carry_out(commands, "rollout");
    }
}

fn short_blocks() -> Spec {
    Spec {
        steps: vec![10, 50, 100],
        block_ms: 1_000,
        burn_in_ms: 100,
        settle_ms: 2_000,
        ttft_slo_ms: 50,
        auto_promote: true,
        ..Spec::of(Mode::Canary, 3)
    }
}

/// Feeds the journal's inputs to the rules again; what they decide must be what the journal says.
fn replay(journal: &Journal) -> RolloutDocument {
    let mut replayed: Option<RolloutDocument> = None;
    let mut expected = std::collections::VecDeque::new();
    for entry in journal.after(0, LINES) {
        let entry = Entry::parse(&entry.to_json()).expect("its own line");
        match (entry.what, &mut replayed) {
            (Happened::RolloutStarted { rollout } | Happened::RolloutRestored { rollout }, _) => {
                replayed = Some(*rollout)
            }
            (Happened::RolloutObserved { period, .. }, Some(document)) => expected.extend(document.observe(&period)),
            (Happened::RolloutDecided { decision, .. }, Some(_)) if entry.actor == "rollout" => {
                assert_eq!(expected.pop_front(), Some(decision), "line {}", entry.sequence);
            }
            (Happened::RolloutDecided { decision, .. }, Some(document)) => document.apply(&decision),
            (other, _) => panic!("{other:?}"),
        }
    }
    assert!(expected.is_empty(), "decided and not journalled: {expected:?}");
    replayed.expect("a rollout")
}

#[test]
fn the_journal_replays_to_the_same_decisions() {
    for (slow, seed, promoted) in [(1.0, 1, true), (3.0, 2, false)] {
        let mut driven = Driven::new(short_blocks(), seed);
        for step in 0..40_000 {
            if driven.rollout.document().phase.is_over() {
                break;
            }
            if step == 300 {
                let decision = driven.rollout.document().ask_pause().expect("it runs");
                let commands = driven.rollout.decide(decision, driven.now);
                driven.carry_out(commands, "admin");
                let decision = driven.rollout.document().ask_resume().expect("it is paused");
                let commands = driven.rollout.decide(decision, driven.now);
                driven.carry_out(commands, "admin");
            }
            driven.step(slow);
        }
        let document = driven.rollout.document();
        let over = Phase::Aborted { cause: Cause::Guard { metric: Metric::TtftOverSlo } };
        assert_eq!(document.phase, if promoted { Phase::Promoted } else { over }, "{:#?}", document.evidence());
        assert!(driven.served.contains(&Arm::Candidate) && driven.served.len() >= 10);
        let replayed = replay(&driven.journal);
        assert_eq!(replayed.phase, document.phase);
        assert_eq!(replayed.evidence(), document.evidence());
        assert_eq!(replayed.progress.holds, document.progress.holds);
    }
}

#[test]
fn a_candidate_that_misbehaves_is_off_at_once() {
    let mut driven = Driven::new(Spec { steps: vec![50], ..short_blocks() }, 5);
    while driven.rollout.serving() == Arm::Control {
        driven.step(1.0);
    }
    let commands = driven.rollout.hard_fault("3 traps within 50 calls".into(), driven.now);
    let cause = Cause::Hard { what: "3 traps within 50 calls".into() };
    assert_eq!(commands, [Command::Decided(Decision::Abort { cause })], "no command lets it serve again");
    assert_eq!(driven.rollout.serving(), Arm::Control);
    let served = driven.served.len();
    (0..1_000).for_each(|_| driven.step(1.0));
    assert_eq!(driven.served.len(), served);
    assert!(driven.rollout.document().ask_promote(false).is_err(), "what is over stays over");
}

/// Answers of one period, of which about `agree` are the same.
fn answers(world: &mut World, agree: f64) -> Answers {
    let (_, offered) = world.weather();
    let agreed = (0..offered).filter(|_| world.random.unit() < agree).count() as u64;
    Answers { agreed, differed: [("other-replica".to_owned(), offered - agreed)].into(), ..Answers::default() }
}

#[test]
fn the_interval_of_a_shadow_covers_the_truth_at_every_look() {
    const RUNS: u64 = 1_000;
    let missed = (1..=RUNS).filter(|&seed| {
        let (mut document, mut world) = (document(Spec::of(Mode::Shadow, seed)), World::new(seed, 0.1, 0.0));
        (0..200).any(|_| {
            let shadow = Some(answers(&mut world, 0.9));
            document.observe(&Period { shadow, ..world.period(&document) });
            let found = document.evidence().shadow.expect("a shadow");
            found.lower.zip(found.upper).is_some_and(|(lower, upper)| !(lower..=upper).contains(&0.9))
        })
    });
    let missed = missed.count() as u64;
    println!(
        "shadow, agreement 0.90, looked at after each of 200 periods: the interval misses it in {missed} of {RUNS} runs at \
         alpha 0.05"
    );
    assert!(missed <= RUNS / 20, "{missed} misses");
}

#[test]
fn a_shadow_counts_answers_per_period_serves_never_and_completes() {
    let spec = Spec { block_ms: 1_000, burn_in_ms: 0, settle_ms: 0, max_periods: 20, ..Spec::of(Mode::Shadow, 3) };
    let mut driven = Driven::new(spec, 6);
    let mut total = Answers::default();
    for tick in 0..2_000 {
        if driven.rollout.document().phase.is_over() {
            break;
        }
        total.agreed += 1;
        *total.differed.entry("would-refuse".to_owned()).or_default() += u64::from(tick % 4 == 0);
        driven.rollout.answered(total.clone());
        driven.step(1.0);
    }
    let document = driven.rollout.document();
    assert_eq!((&document.phase, document.progress.periods), (&Phase::Completed, 20));
    assert_eq!((driven.served.as_slice(), driven.rollout.serving()), (&[][..], Arm::Control));
    let found = document.evidence().shadow.expect("a shadow");
    let counted = &found.answers;
    assert!(counted.agreed >= 380 && counted.agreed <= total.agreed, "{found:?}");
    assert!((0.79..0.81).contains(&found.share.expect("periods")), "{found:?}");
    assert!(document.progress.holds.is_empty() && document.ask_promote(false).is_err());
    let replayed = replay(&driven.journal);
    assert_eq!((replayed.evidence(), &replayed.phase), (document.evidence(), &document.phase));
}

#[test]
fn a_shadows_answers_are_of_the_period_in_which_they_came() {
    let spec = Spec { block_ms: 1_000, burn_in_ms: 0, settle_ms: 60_000, ..Spec::of(Mode::Shadow, 3) };
    let mut rollout = Rollout::new(document(spec), Split::Time { generations: None });
    let event = |at_ms: Micros, kind| Event { request: 1, ..Event::new(at_ms * 1_000, kind) };
    let mut periods = Vec::new();
    // A request of the first period runs until the third, and meanwhile the answers change.
    for (at_ms, agreed, differed, happened) in [
        (0, 0, 0, None),
        (400, 5, 0, Some(EventKind::Admitted)),
        (1_010, 7, 0, None),
        (1_400, 7, 3, None),
        (2_010, 7, 4, None),
        (2_400, 9, 4, Some(EventKind::Finished)),
        (3_010, 9, 4, None),
        (3_300, 9, 9, None),
    ] {
        happened.into_iter().for_each(|kind| rollout.note(&event(at_ms, kind), &mut |_| {}));
        let differed = [("other-replica".to_owned(), differed)].into();
        rollout.answered(Answers { agreed, differed, ..Answers::default() });
        periods.extend(rollout.tick(at_ms * 1_000).into_iter().filter_map(|command| match command {
            Command::Observed(period) => period.shadow.map(|shadow| (period.number, shadow.agreed, shadow.compared())),
            _ => None,
        }));
    }
    assert_eq!(periods, [(0, 7, 7), (1, 0, 4), (2, 2, 2)]);
}

#[test]
fn a_shadow_without_traffic_waits_and_one_that_misbehaves_is_off() {
    let mut driven = Driven::new(Spec { block_ms: 1_000, burn_in_ms: 0, ..Spec::of(Mode::Shadow, 3) }, 6);
    (0..2_000).for_each(|_| driven.step(1.0));
    let document = driven.rollout.document();
    assert_eq!((&document.phase, document.progress.periods, document.progress.holds.len()), (&Phase::Running, 0, 0));
    let none = document.evidence().shadow.expect("a shadow");
    assert_eq!((none.n, none.share, none.lower), (0, None, None));
    driven.rollout.hard_fault("3 traps within 50 calls".into(), driven.now);
    assert!(matches!(driven.rollout.document().phase, Phase::Aborted { cause: Cause::Hard { .. } }));
}

#[test]
fn missing_data_holds_and_neither_promotes_nor_aborts() {
    let mut document = document(Spec { auto_promote: true, ..Spec::of(Mode::Switchback, 1) });
    let mut world = World::new(9, 0.1, 0.0);
    let lost = |period: Period| Period { incomplete: true, ..period };
    let silent = |mut period: Period| {
        period.candidate = ArmPeriod { n_blocks: period.candidate.n_blocks, ..ArmPeriod::default() };
        period
    };
    for (spoil, hold) in [(&silent as &dyn Fn(Period) -> Period, Hold::NoTraffic), (&lost, Hold::StaleMetrics)] {
        let decisions: Vec<Decision> = (0..100)
            .flat_map(|_| {
                let period = world.period(&document);
                document.observe(&spoil(period))
            })
            .collect();
        assert_eq!(decisions, [Decision::Hold { why: vec![hold] }]);
        assert_eq!(document.progress.periods, 0);
        let period = world.period(&document);
        assert_eq!(document.observe(&period), [Decision::Release]);
        document.progress =
            RolloutDocument::new("r".into(), "s".into(), Default::default(), document.spec.clone()).progress;
    }
}

#[test]
fn a_split_that_is_not_the_plans_holds_the_ramp() {
    type Spoil = fn(&mut Period);
    let rows: [(Spoil, Hold); 3] = [
        (|p| p.candidate.sums.offered /= 2, Hold::SampleRatio),
        (|p| p.candidate.sums.misplaced = p.candidate.sums.offered / 10, Hold::Exposure),
        (|p| p.control.sums.crossed = p.control.sums.offered, Hold::ShortBlocks),
    ];
    for (spoil, hold) in rows {
        let mut document = document(Spec { auto_promote: true, ..Spec::of(Mode::Switchback, 1) });
        let mut world = World::new(11, 0.1, 0.0);
        for _ in 0..200 {
            let mut period = world.period(&document);
            spoil(&mut period);
            document.observe(&period);
        }
        assert_eq!((document.progress.holds.as_slice(), &document.phase), (&[hold][..], &Phase::Running));
    }
}

#[test]
fn without_leave_it_waits_at_every_step() {
    let mut document = document(Spec { steps: vec![50, 100], ..Spec::of(Mode::Canary, 1) });
    let mut world = World::new(13, 0.1, 0.0);
    let mut decisions = Vec::new();
    for _ in 0..300 {
        let period = world.period(&document);
        decisions.extend(document.observe(&period));
    }
    // The evidence may come and go at the margin; the step stays.
    assert_eq!(decisions.first(), Some(&Decision::Ready { percent: 50 }));
    assert_eq!(decisions.last(), Some(&Decision::Ready { percent: 50 }));
    assert_eq!((document.percent(), &document.phase), (50, &Phase::Running));
    // Periods without an answer from the candidate's side: what was ready is not any more.
    for _ in 0..3 {
        let period = Period { candidate: ArmPeriod::default(), ..world.period(&document) };
        decisions.extend(document.observe(&period));
    }
    assert!(!document.progress.ready, "{decisions:?}");
    let next = document.ask_promote(true).expect("there is a next step");
    assert_eq!(next, Decision::Step { from: 50, to: 100 });
    document.apply(&next);
    assert!(document.ask_promote(true).is_err(), "it is the last step");
    assert_eq!(document.ask_promote(false), Ok(Decision::Promote));
}
