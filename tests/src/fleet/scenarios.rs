//! What the shipped policies are for, each as a trace and the policies that are compared on it. The simulation asserts the
//! figures, the benchmark prints them for the real engine.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pointsman_sched::batch::NativeBatch;
use pointsman_sched::config::Config;
use pointsman_sched::execute::{StepOutput, StepPlan};
use pointsman_sched::ids::{Micros, Priority};
use pointsman_sched::route::{NativeRouter, RoutePolicy};

use super::guests::Guests;
use super::traces::{Source, trace};
use super::{Ask, Cost, Device, Fate, Policies, Replica, RoundRobin, serve};

/// Where replicas compute.
pub trait Stage {
    /// What a step costs there, about: loads are shares of it.
    fn cost(&self) -> Cost;

    /// A device that takes `times` as long.
    fn device(&self, config: &Config, times: u64) -> Box<dyn Device>;
}

/// A policy's line in a table.
#[derive(Clone, Debug)]
pub struct Figures {
    /// The policy, and whose requests these are.
    pub name: String,
    /// Requests served to their end.
    pub served: usize,
    /// Requests refused.
    pub refused: usize,
    /// Time to the first token.
    pub ttft: Latency,
    /// Time to the last token.
    pub e2e: Latency,
}

/// What a policy has to be worth.
#[derive(Clone, Debug)]
pub struct Bar {
    /// A ratio of two figures, or a count.
    pub what: &'static str,
    /// What it is.
    pub found: f64,
    /// What it must be at least or at most.
    pub limit: f64,
    /// Whether the limit is the least.
    pub at_least: bool,
}

/// What a scenario came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// A line for each policy and group of requests.
    pub figures: Vec<Figures>,
    /// What they say of the policy.
    pub bars: Vec<Bar>,
}

/// A scenario: where to compute, and the seed of its traffic.
pub type Scenario = fn(&dyn Stage, u64) -> Outcome;

/// All of them, with their titles.
pub const ALL: [(&str, Scenario); 5] = [
    ("shortest first: short chats among long documents, in waves of 1.6 of what the replica can do", shortest_first),
    ("priority: a tenth of the load is critical; the rest grows to twice what the replica can do", priority),
    ("fair share: a light tenant beside a flood of twice what the replica can do", fair_share),
    ("prefix aware: four replicas and 40 shared prefixes, of which a replica's cache holds 17 at most", prefix_aware),
    ("bandit: one of two replicas takes three times as long, and at half time they change places", bandit),
];

/// Of those served.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Mean, in milliseconds.
    pub mean: f64,
    /// 99th percentile, in milliseconds.
    pub p99: f64,
}

/// Bounds of every replica here: those of the host's defaults, but for a smaller batch.
pub const CONFIG: Config = Config {
    block_tokens: 16,
    n_blocks: 1_024,
    max_running: 16,
    step_tokens: 256,
    max_waiting: 256,
    prefill_chunk: 128,
    starvation_us: 10_000_000,
    context_tokens: 1_024,
};

const SECOND: Micros = 1_000_000;

impl Stage for Cost {
    fn cost(&self) -> Cost {
        *self
    }

    fn device(&self, _config: &Config, times: u64) -> Box<dyn Device> {
        Box::new(self.times(times))
    }
}

// === impl Figures ===

impl Figures {
    /// Of the requests of a trace that `of` picks.
    #[must_use]
    pub fn of(name: impl Into<String>, (asks, fates): (&[Ask], &[Fate]), of: impl Fn(&Ask) -> bool) -> Self {
        let rows: Vec<Fate> = asks.iter().zip(fates).filter(|(ask, _)| of(ask)).map(|(_, fate)| *fate).collect();
        let served: Vec<&Fate> = rows.iter().filter(|fate| fate.replica.is_some()).collect();
        assert!(served.iter().all(|fate| fate.ttft > 0 && fate.e2e > 0), "a request was taken and never ended");
        let latency = |of: fn(&Fate) -> Micros| Latency::of(served.iter().map(|fate| of(fate)).collect());
        Self {
            name: name.into(),
            served: served.len(),
            refused: rows.len() - served.len(),
            ttft: latency(|fate| fate.ttft),
            e2e: latency(|fate| fate.e2e),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, served, refused, ttft, e2e } = self;
        let [a, b, c, d] = [ttft.mean, ttft.p99, e2e.mean, e2e.p99].map(|ms| format!("{ms:.1} ms"));
        write!(f, "{name:<42} ttft mean {a:>10} p99 {b:>10}   e2e mean {c:>10} p99 {d:>10}   ")?;
        write!(f, "served {served:>5}  refused {refused:>4}")
    }
}

// === impl Bar ===

impl Bar {
    fn at_least(what: &'static str, found: f64, limit: f64) -> Self {
        Self { what, found, limit, at_least: true }
    }

    fn at_most(what: &'static str, found: f64, limit: f64) -> Self {
        Self { what, found, limit, at_least: false }
    }

    /// Nothing may be refused that the policy is there for.
    fn none_refused(what: &'static str, figures: &[&Figures]) -> Self {
        Self::at_most(what, figures.iter().map(|line| line.refused).sum::<usize>() as f64, 0.0)
    }

    /// Whether it holds.
    #[must_use]
    pub fn is_met(&self) -> bool {
        if self.at_least { self.found >= self.limit } else { self.found <= self.limit }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, found, limit, at_least } = self;
        let (bound, verdict) = (if *at_least { ">=" } else { "<=" }, if self.is_met() { "met" } else { "MISSED" });
        write!(f, "{what}: {found:.2}   bar {bound} {limit} {verdict}")
    }
}

impl Latency {
    fn of(mut micros: Vec<Micros>) -> Self {
        micros.sort_unstable();
        let n = micros.len().max(1);
        let p99 = micros.get((n * 99).div_ceil(100) - 1).copied().unwrap_or(0);
        Self { mean: micros.iter().sum::<Micros>() as f64 / n as f64 / 1e3, p99: p99 as f64 / 1e3 }
    }
}

// === The scenarios ===

/// Short chats among long documents, in waves over what the replica can do. Fcfs, then shortest first.
#[must_use]
pub fn shortest_first(stage: &dyn Stage, seed: u64) -> Outcome {
    let cost = stage.cost();
    let wave = |share: f64, during: Range<Micros>| {
        let chats = Source { prompt: 20..120, new: 8..40, during: during.clone(), ..Source::default() };
        let documents = Source { class: 1, prompt: 400..800, new: 60..140, during, ..Source::default() };
        let places = CONFIG.max_running;
        [chats.at_load(share * (1.0 - 0.6), &cost, places), documents.at_load(share * 0.6, &cost, places)]
    };
    let waves = (0..3).flat_map(|i| {
        let start = i * 10 * SECOND;
        wave(1.6, start..start + 4 * SECOND).into_iter().chain(wave(0.4, start + 4 * SECOND..start + 10 * SECOND))
    });
    let asks = trace(seed, &waves.collect::<Vec<_>>());
    let run = |name: &str| {
        let fates = alone(stage, &asks, (name, "{}"), seed);
        Figures::of(name, (&asks, &fates), |_| true)
    };
    let figures = ["sched-fcfs", "sched-shortest-first"].map(run);
    let [fcfs, shortest] = &figures;
    let bars = vec![
        Bar::at_least("mean e2e, fcfs over shortest first", fcfs.e2e.mean / shortest.e2e.mean, 1.5),
        Bar::at_most("p99 e2e, shortest first over fcfs", shortest.e2e.p99 / fcfs.e2e.p99, 1.5),
    ];
    Outcome { figures: figures.into(), bars }
}

/// Critical requests among others, at half of what the replica can do and at twice as much. The critical ones' figures, then
/// everybody's: fcfs at both loads, then priorities.
#[must_use]
pub fn priority(stage: &dyn Stage, seed: u64) -> Outcome {
    let cost = stage.cost();
    let at = |load: f64| {
        // The critical ones do not grow with the overload.
        let critical = Source { priority: Priority::Critical, during: 0..20 * SECOND, ..Source::default() };
        let others = |priority| Source { class: 1, priority, new: 16..96, ..critical.clone() };
        let places = CONFIG.max_running;
        let rest = (load - 0.1) / 2.0;
        trace(
            seed,
            &[
                critical.clone().at_load(0.1, &cost, places),
                others(Priority::Normal).at_load(rest, &cost, places),
                others(Priority::Low).at_load(rest, &cost, places),
            ],
        )
    };
    let loads = [(0.5, "half load"), (2.0, "double load")].map(|(load, name)| (at(load), name));
    let mut figures = Vec::new();
    for (policy, config) in [("sched-fcfs", "{}"), ("sched-priority", r#"{"preempt": true, "max_waiting": 128}"#)] {
        for (asks, load) in &loads {
            let fates = alone(stage, asks, (policy, config), seed);
            let line = |whose: &str, of: fn(&Ask) -> bool| {
                Figures::of(format!("{policy}, {load}, {whose}"), (asks, &fates), of)
            };
            figures.push(line("critical", |ask| ask.class == 0));
            figures.push(line("all", |_| true));
        }
    }
    let (calm, loaded) = (&figures[4], &figures[6]);
    let bars = vec![
        Bar::at_most("critical p99 ttft, double load over half", loaded.ttft.p99 / calm.ttft.p99, 1.5),
        Bar::none_refused("critical requests refused", &[calm, loaded]),
    ];
    Outcome { figures, bars }
}

/// A tenant with little traffic: alone, then beside a flood of twice what the replica can do. The light tenant's figures,
/// then the flood's: alone (fair share), beside the flood under fcfs and under fair share.
#[must_use]
pub fn fair_share(stage: &dyn Stage, seed: u64) -> Outcome {
    let cost = stage.cost();
    let light = Source { tenant: 1, prompt: 200..400, new: 16..48, during: 0..20 * SECOND, ..Source::default() };
    let flood = Source { class: 1, tenant: 2, prompt: 20..200, new: 16..96, ..light.clone() };
    let light = light.at_load(0.1, &cost, CONFIG.max_running);
    let idle = trace(seed, std::slice::from_ref(&light));
    let both = trace(seed, &[light, flood.at_load(2.0, &cost, CONFIG.max_running)]);
    let fair = ("sched-fair-share", r#"{"max_waiting": 128}"#);
    let mut figures = Vec::new();
    for (asks, policy, name) in [
        (&idle, fair, "sched-fair-share, no flood"),
        (&both, ("sched-fcfs", "{}"), "sched-fcfs, flood"),
        (&both, fair, "sched-fair-share, flood"),
    ] {
        let fates = alone(stage, asks, policy, seed);
        figures.push(Figures::of(format!("{name}, light"), (asks, &fates), |ask| ask.class == 0));
        if asks.iter().any(|ask| ask.class == 1) {
            figures.push(Figures::of(format!("{name}, flooding"), (asks, &fates), |ask| ask.class == 1));
        }
    }
    let (idle, beside) = (&figures[0], &figures[3]);
    let bars = vec![
        Bar::at_most("light tenant's mean ttft, beside the flood over alone", beside.ttft.mean / idle.ttft.mean, 1.5),
        Bar::none_refused("light tenant's requests refused", &[idle, beside]),
    ];
    Outcome { figures, bars }
}

/// Four replicas and more shared prefixes than the cache of one holds. Round robin, least loaded, then prefix aware.
#[must_use]
pub fn prefix_aware(stage: &dyn Stage, seed: u64) -> Outcome {
    let config = Config { n_blocks: 512, ..CONFIG };
    let source =
        Source { prompt: 16..64, prefixes: (40, 480), new: 8..40, during: 0..20 * SECOND, ..Source::default() };
    // All prompts computed in full would be so much of the four replicas.
    let source = source.at_load(4.0 * 0.7, &stage.cost(), config.max_running);
    let asks = trace(seed, &[source]);
    let guests = Guests::start();
    let run = |name: &str, router: &dyn RoutePolicy| {
        let replicas = (0..4).map(|_| native(&config, stage.device(&config, 1))).collect();
        let policies = Policies { router, hook: None, clock: &guests.clock };
        let fates = serve(&asks, replicas, &policies, seed);
        Figures::of(name, (&asks, &fates), |_| true)
    };
    let figures = vec![
        run("round robin", &RoundRobin::default()),
        run("route-least-loaded", &*guests.router("route-least-loaded", "{}", None)),
        run("route-prefix-aware", &*guests.router("route-prefix-aware", "{}", None)),
    ];
    let ratio = figures[0].ttft.mean / figures[2].ttft.mean;
    let bars = vec![Bar::at_least("mean ttft, round robin over prefix aware", ratio, 2.0)];
    Outcome { figures, bars }
}

/// Two replicas, one of which takes three times as long, under half of the load that the fast one can carry; at half time
/// they change places, which only outcomes tell.
#[must_use]
pub fn bandit(stage: &dyn Stage, seed: u64) -> Outcome {
    const HALF: Micros = 60 * SECOND;
    let source = Source { prompt: 20..200, new: 8..64, during: 0..2 * HALF, ..Source::default() };
    let asks = trace(seed, &[source.at_load(0.5, &stage.cost(), CONFIG.max_running)]);
    let guests = Guests::start();
    let run = |router: &dyn RoutePolicy, hook| {
        let replicas = [1, 3].map(|times| {
            let [before, after] = [times, 4 - times].map(|times| stage.device(&CONFIG, times));
            native(&CONFIG, Box::new(Changing { before, after, at: HALF, clock: Arc::clone(&guests.clock) }))
        });
        serve(&asks, replicas.into(), &Policies { router, hook, clock: &guests.clock }, seed)
    };
    let hook = guests.hook("hook-outcomes", r#"{"half_life_s": 5}"#, Some("outcomes"));
    let learned = run(&*guests.router("route-bandit", "{}", Some("outcomes")), Some(&*hook));
    let share = |during: Range<Micros>, fast: usize| {
        let of = asks.iter().zip(&learned).filter(|(ask, _)| during.contains(&ask.at));
        let (all, fast) = of.fold((0, 0), |(n, hits), (_, fate)| (n + 1, hits + u32::from(fate.replica == Some(fast))));
        f64::from(fast) / f64::from(all.max(1))
    };
    let shares = [share(HALF / 2..HALF, 0), share(2 * HALF - HALF / 3..2 * HALF, 1)];
    let round_robin = run(&RoundRobin::default(), None);
    let least_loaded = run(&*guests.router("route-least-loaded", "{}", None), None);
    let figures = [("round robin", &round_robin), ("route-least-loaded", &least_loaded), ("route-bandit", &learned)];
    let figures = figures.map(|(name, fates)| Figures::of(name, (&asks, fates), |_| true));
    let [round_robin, least_loaded, learned] = &figures;
    let bars = vec![
        Bar::at_least("share of the fast replica, after 30 s", shares[0], 0.9),
        Bar::at_least("share of the one that has become the fast one, 40 s after that", shares[1], 0.9),
        Bar::at_least("mean e2e, round robin over bandit", round_robin.e2e.mean / learned.e2e.mean, 2.0),
        Bar::at_least("mean e2e, least loaded over bandit", least_loaded.e2e.mean / learned.e2e.mean, 1.0),
    ];
    Outcome { figures: figures.into(), bars }
}

/// A device that becomes another one.
struct Changing {
    before: Box<dyn Device>,
    after: Box<dyn Device>,
    at: Micros,
    clock: Arc<AtomicU64>,
}

impl Device for Changing {
    fn run(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Micros {
        let now = self.clock.load(Ordering::Relaxed);
        if now < self.at { self.before.run(plan, out) } else { self.after.run(plan, out) }
    }
}

/// A replica with the host's own scheduler.
fn native(config: &Config, device: Box<dyn Device>) -> Replica {
    Replica { config: *config, policy: Box::new(NativeBatch), device }
}

/// One replica under a scheduler guest.
fn alone(stage: &dyn Stage, asks: &[Ask], (name, config): (&str, &str), seed: u64) -> Vec<Fate> {
    let guests = Guests::start();
    let replica = Replica { policy: guests.scheduler(name, config), ..native(&CONFIG, stage.device(&CONFIG, 1)) };
    serve(asks, vec![replica], &Policies { router: &NativeRouter, hook: None, clock: &guests.clock }, seed)
}
