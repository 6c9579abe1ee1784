//! What the shipped policies are worth on the CPU engine: the scenarios of `tests/sim/earn.rs`, with steps that the demo model
//! computes, beside the same bars. Arrivals follow a virtual clock and each step advances it by what it took, so that four
//! replicas need no four machines, and loads are shares of what a replica does with the same traffic at saturation.
//!
//! A replica computes on one thread and its steps take what they take of that thread's own time, so that other programs on the
//! machine disturb a figure as little as they can. What they still do to it (caches, the clock of the cores) shows in the pace,
//! which is measured before and after each scenario.
//!
//! Takes about six minutes: `cargo bench --profile release -p pointsman-benches --bench policies -- [SCENARIO] [SEED]`.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::sync::Arc;

use anyhow::{Context, bail};
use pointsman_benches::{header, now};
use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Model, ModelSpec, Precision, Weights};
use pointsman_sched::config::Config;
use pointsman_sched::execute::{Executor, StepOutput, StepPlan};
use pointsman_sched::ids::Micros;
use pointsman_sched::sampler::NoEdits;
use pointsman_tests::fleet::Device;
use pointsman_tests::fleet::scenarios::{self, Outcome, Stage};
use rustix::time::{ClockId, clock_gettime};

/// A pace that changes by more than this within a scenario has made its loads others.
const DRIFT: f64 = 0.1;

/// The demo model on one thread of this machine.
struct Cpu {
    model: Arc<Model>,
    pool: ComputePool,
}

/// An engine whose steps take what they used of this thread's time.
struct Timed(CpuEngine);

impl Device for Timed {
    fn run(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Micros {
        let start = thread_micros();
        self.0.execute(plan, &mut NoEdits, out).unwrap_or_else(|error| panic!("{error}"));
        thread_micros() - start
    }
}

fn thread_micros() -> Micros {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec * 1_000_000 + time.tv_nsec / 1_000).unwrap_or(0)
}

impl Stage for Cpu {
    fn device(&self, config: &Config) -> Box<dyn Device> {
        let config = EngineConfig {
            n_blocks: config.n_blocks as usize,
            block_tokens: config.block_tokens as usize,
            max_step_tokens: config.step_tokens as usize,
            max_rows: config.max_running as usize,
            context_tokens: config.context_tokens as usize,
        };
        let engine = CpuEngine::new(Arc::clone(&self.model), self.pool.clone(), config);
        Box::new(Timed(engine.unwrap_or_else(|error| panic!("{error}"))))
    }
}

/// The scenario to run, all if none, and the seed.
fn arguments() -> anyhow::Result<(Option<String>, u64)> {
    let (mut chosen, mut seed) = (None, 1);
    // Cargo adds `--bench`.
    for word in std::env::args().skip(1).filter(|word| !word.starts_with("--")) {
        match word.parse() {
            Ok(number) => seed = number,
            Err(_) => chosen = Some(word),
        }
    }
    let names = scenarios::ALL.map(|(name, ..)| name);
    match chosen {
        Some(name) if !names.contains(&&*name) => {
            bail!("no scenario is called `{name}`; there are {}", names.join(", "))
        }
        chosen => Ok((chosen, seed)),
    }
}

fn main() -> anyhow::Result<()> {
    let (chosen, seed) = arguments()?;
    header("policies: what they are worth on the CPU engine");
    let folder = pointsman_tests::root().join("host/app/demo/demo");
    let spec = ModelSpec::from_config(&std::fs::read(folder.join("config.json")).context("the demo model")?)?;
    let model = Arc::new(Model::load(spec, &Weights::open(&folder)?, Precision::F16)?);
    let cpu = Cpu { model, pool: ComputePool::start(1)? };
    for (name, title, scenario) in scenarios::ALL {
        if chosen.as_deref().is_some_and(|chosen| chosen != name) {
            continue;
        }
        let start = now();
        let Outcome { figures, bars, unit_us: [before, after] } = scenario(&cpu, seed);
        println!("{name}: {title}, seed {seed}, {:.0} s", start.elapsed().as_secs_f64());
        figures.iter().for_each(|line| println!("  {line}"));
        bars.iter().for_each(|bar| println!("  {bar}"));
        let steady = (after / before - 1.0).abs() <= DRIFT;
        let verdict = if steady { "steady" } else { "NOT STEADY: run it again on an idle machine" };
        println!("  pace at saturation: {before:.1} us a unit of work before, {after:.1} us after, {verdict}");
    }
    Ok(())
}
