//! What the shipped policies are for, each as a trace and the policies that are compared on it. The simulation asserts the
//! figures, the benchmark prints them for the real engine.
//!
//! Loads are shares of what a replica can do, which is measured with the scenario's own mix at saturation, not computed from
//! the cost of a step: prompts in the middle, chunks beside decodes and a batch that is never quite full make a quarter more
//! or less of it, and that decides whether a queue empties at all.

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
    /// A device for one replica.
    fn device(&self, config: &Config) -> Box<dyn Device>;
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
    /// Microseconds that a replica took for a unit of work at saturation, before the first figure and after the last: loads
    /// are what they are said to be as far as these agree.
    pub unit_us: [f64; 2],
}

/// Where to compute, and the seed of the traffic.
pub type Scenario = fn(&dyn Stage, u64) -> Outcome;

/// All of them: name, title, and what to run.
pub const ALL: [(&str, &str, Scenario); 5] = [
    ("shortest-first", "short chats among long documents, in waves of 1.6 of what the replica can do", shortest_first),
    ("priority", "a tenth of the load is critical; the rest grows to twice what the replica can do", priority),
    ("fair-share", "a light tenant beside a flood of twice what the replica can do", fair_share),
    ("prefix-aware", "four replicas and 40 shared prefixes, of which a replica's cache holds 17 at most", prefix_aware),
    ("bandit", "one of two replicas takes three times as long, and at half time they change places", bandit),
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
    fn device(&self, _config: &Config) -> Box<dyn Device> {
        Box::new(*self)
    }
}

/// Traffic of several sources, each with its share of what a replica can do.
struct Load<'a> {
    stage: &'a dyn Stage,
    config: Config,
    seed: u64,
    mix: Vec<(f64, Source)>,
    /// Microseconds for a unit of work, with always more of it waiting.
    unit_us: f64,
}

// === impl Load ===

impl<'a> Load<'a> {
    fn measure(stage: &'a dyn Stage, config: &Config, seed: u64, mix: Vec<(f64, Source)>) -> Self {
        let load = Self { stage, config: *config, seed, mix, unit_us: 0.0 };
        Self { unit_us: load.saturate(), ..load }
    }

    /// Lets a replica work through a full queue of the mix, in order.
    fn saturate(&self) -> f64 {
        let n = self.config.max_waiting as usize;
        let per_micro: f64 = self.mix.iter().map(|(share, source)| share / source.work()).sum();
        let during = 0..(1.5 * n as f64 / per_micro) as Micros;
        let sources = self
            .mix
            .iter()
            .map(|(share, source)| Source { during: during.clone(), ..source.clone() }.at_load(*share, 1.0));
        let mut asks = trace(self.seed, &sources.collect::<Vec<_>>());
        asks.truncate(n);
        asks.iter_mut().for_each(|ask| ask.at = 1);
        let replica = native(&self.config, self.stage.device(&self.config));
        let policies = Policies { router: &NativeRouter, hook: None, clock: &AtomicU64::new(1) };
        let fates = serve(&asks, vec![replica], &policies, self.seed);
        let took = fates.iter().map(|fate| fate.e2e).max().unwrap_or(0);
        took as f64 / asks.iter().map(Ask::work).sum::<f64>()
    }

    /// The traffic at these loads.
    fn trace(&self) -> Vec<Ask> {
        let sources = self.mix.iter().map(|(share, source)| source.clone().at_load(*share, self.unit_us));
        trace(self.seed, &sources.collect::<Vec<_>>())
    }

    fn outcome(&self, figures: Vec<Figures>, bars: Vec<Bar>) -> Outcome {
        Outcome { figures, bars, unit_us: [self.unit_us, self.saturate()] }
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
    let chats = Source { prompt: 20..120, new: 8..40, ..Source::default() };
    let documents = Source { class: 1, prompt: 400..800, new: 60..140, ..Source::default() };
    let wave = |share: f64, during: Range<Micros>| {
        let at = |share, source: &Source| (share, Source { during: during.clone(), ..source.clone() });
        [at(share * 0.4, &chats), at(share * 0.6, &documents)]
    };
    let waves = (0..3).flat_map(|i| {
        let start = i * 10 * SECOND;
        wave(1.6, start..start + 4 * SECOND).into_iter().chain(wave(0.4, start + 4 * SECOND..start + 10 * SECOND))
    });
    let load = Load::measure(stage, &CONFIG, seed, waves.collect());
    let asks = load.trace();
    let run = |name: &str| {
        let fates = alone(stage, &asks, (name, "{}"), seed);
        Figures::of(name, (&asks, &fates), |_| true)
    };
    let figures = ["sched-fcfs", "sched-shortest-first"].map(run);
    let [fcfs, shortest] = &figures;
    let bars = vec![
        Bar::at_least("mean e2e, fcfs over shortest first", fcfs.e2e.mean / shortest.e2e.mean, 1.5),
        Bar::at_most("p99 e2e, shortest first over fcfs", shortest.e2e.p99 / fcfs.e2e.p99, 1.5),
        Bar::none_refused("requests refused", &[fcfs, shortest]),
    ];
    load.outcome(figures.into(), bars)
}

/// Critical requests among others, at half of what the replica can do and at twice as much. The critical ones' figures, then
/// everybody's: fcfs at both loads, then priorities.
#[must_use]
pub fn priority(stage: &dyn Stage, seed: u64) -> Outcome {
    let mix = |load: f64| {
        // The critical ones do not grow with the overload.
        let critical = Source { priority: Priority::Critical, during: 0..20 * SECOND, ..Source::default() };
        let others = |priority| Source { class: 1, priority, new: 16..96, ..critical.clone() };
        let rest = (load - 0.1) / 2.0;
        vec![(0.1, critical.clone()), (rest, others(Priority::Normal)), (rest, others(Priority::Low))]
    };
    let double = Load::measure(stage, &CONFIG, seed, mix(2.0));
    let half = Load { mix: mix(0.5), ..double };
    let loads = [(half.trace(), "half load"), (double.trace(), "double load")];
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
    double.outcome(figures, bars)
}

/// A tenant with little traffic: alone, then beside a flood of twice what the replica can do. The light tenant's figures,
/// then the flood's: alone (fair share), beside the flood under fcfs and under fair share.
#[must_use]
pub fn fair_share(stage: &dyn Stage, seed: u64) -> Outcome {
    let light = Source { tenant: 1, prompt: 200..400, new: 16..48, during: 0..20 * SECOND, ..Source::default() };
    let flood = Source { class: 1, tenant: 2, prompt: 20..200, new: 16..96, ..light.clone() };
    let load = Load::measure(stage, &CONFIG, seed, vec![(0.1, light), (2.0, flood)]);
    let both = load.trace();
    let idle = both.iter().filter(|ask| ask.class == 0).cloned().collect::<Vec<_>>();
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
    load.outcome(figures, bars)
}

/// Four replicas and more shared prefixes than the cache of one holds. Round robin, least loaded, then prefix aware.
#[must_use]
pub fn prefix_aware(stage: &dyn Stage, seed: u64) -> Outcome {
    const PREFIX: u32 = 480;
    let config = Config { n_blocks: 512, ..CONFIG };
    let source = Source { prompt: 16..64, new: 8..40, during: 0..15 * SECOND, ..Source::default() };
    // All prompts computed in full would be so much of the four replicas.
    let cold = Source { prompt: source.prompt.start + PREFIX..source.prompt.end + PREFIX, ..source.clone() };
    let load = Load::measure(stage, &config, seed, vec![(4.0 * 0.7, cold)]);
    let source = Source { prefixes: (40, PREFIX), ..source };
    let asks = trace(seed, &[source.at_load(4.0 * 0.7, load.unit_us)]);
    let guests = Guests::start();
    let run = |name: &str, router: &dyn RoutePolicy| {
        let replicas = (0..4).map(|_| native(&config, stage.device(&config))).collect();
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
    let bars = vec![
        Bar::at_least("mean ttft, round robin over prefix aware", ratio, 2.0),
        Bar::none_refused("requests refused", &figures.iter().collect::<Vec<_>>()),
    ];
    load.outcome(figures, bars)
}

/// Two replicas, one of which takes three times as long, under half of the load that the fast one can carry; at half time
/// they change places, which only outcomes tell.
#[must_use]
pub fn bandit(stage: &dyn Stage, seed: u64) -> Outcome {
    bandit_at(stage, seed, 0.5)
}

/// The same under so much of the load that the fast one can carry; both together carry 1.33.
#[must_use]
pub fn bandit_at(stage: &dyn Stage, seed: u64, share: f64) -> Outcome {
    const HALF: Micros = 30 * SECOND;
    let source = Source { prompt: 20..200, new: 8..64, during: 0..2 * HALF, ..Source::default() };
    let load = Load::measure(stage, &CONFIG, seed, vec![(share, source)]);
    let asks = load.trace();
    let guests = Guests::start();
    let run = |router: &dyn RoutePolicy, hook| {
        let replicas = [[1, 3], [3, 1]].map(|times| {
            let (device, clock) = (stage.device(&CONFIG), Arc::clone(&guests.clock));
            native(&CONFIG, Box::new(Changing { device, times, at: HALF, clock }))
        });
        serve(&asks, replicas.into(), &Policies { router, hook, clock: &guests.clock }, seed)
    };
    let hook = guests.hook("hook-outcomes", r#"{"half_life_s": 5}"#, Some("outcomes"));
    let learned = run(&*guests.router("route-bandit", "{}", Some("outcomes")), Some(&*hook));
    let share_of = |during: Range<Micros>, fast: usize| {
        let of = asks.iter().zip(&learned).filter(|(ask, _)| during.contains(&ask.at));
        let (all, fast) = of.fold((0, 0), |(n, hits), (_, fate)| (n + 1, hits + u32::from(fate.replica == Some(fast))));
        f64::from(fast) / f64::from(all.max(1))
    };
    let shares = [share_of(HALF / 2..HALF, 0), share_of(2 * HALF - HALF / 3..2 * HALF, 1)];
    let round_robin = run(&RoundRobin::default(), None);
    let least_loaded = run(&*guests.router("route-least-loaded", "{}", None), None);
    let figures = [("round robin", &round_robin), ("route-least-loaded", &least_loaded), ("route-bandit", &learned)];
    let figures = figures.map(|(name, fates)| Figures::of(name, (&asks, fates), |_| true));
    let [round_robin, least_loaded, learned] = &figures;
    let bars = vec![
        Bar::at_least("share of the fast replica, after 15 s", shares[0], 0.9),
        Bar::at_least("share of the one that has become the fast one, 20 s after that", shares[1], 0.9),
        Bar::at_least("mean e2e, round robin over bandit", round_robin.e2e.mean / learned.e2e.mean, 2.0),
        Bar::at_least("mean e2e, least loaded over bandit", least_loaded.e2e.mean / learned.e2e.mean, 1.0),
        Bar::none_refused("requests refused", &[learned]),
    ];
    load.outcome(figures.into(), bars)
}

/// A device that takes so many times as long, until a moment and from then on.
struct Changing {
    device: Box<dyn Device>,
    times: [u64; 2],
    at: Micros,
    clock: Arc<AtomicU64>,
}

impl Device for Changing {
    fn run(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Micros {
        let now = self.clock.load(Ordering::Relaxed);
        self.device.run(plan, out) * self.times[usize::from(now >= self.at)]
    }
}

/// A replica with the host's own scheduler.
fn native(config: &Config, device: Box<dyn Device>) -> Replica {
    Replica { config: *config, policy: Box::new(NativeBatch), device }
}

/// One replica under a scheduler guest.
fn alone(stage: &dyn Stage, asks: &[Ask], (name, config): (&str, &str), seed: u64) -> Vec<Fate> {
    let guests = Guests::start();
    let replica = Replica { policy: guests.scheduler(name, config), ..native(&CONFIG, stage.device(&CONFIG)) };
    serve(asks, vec![replica], &Policies { router: &NativeRouter, hook: None, clock: &guests.clock }, seed)
}
