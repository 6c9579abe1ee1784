//! What the shipped policies are worth on the CPU engine: the scenarios of `tests/sim/earn.rs`, with steps that the demo model
//! computes, beside the same bars. Arrivals follow a virtual clock and each step advances it by what it took, so that four
//! replicas need no four machines, and loads are shares of what this machine can do, measured first.
//!
//! Takes about ten minutes: `cargo bench --profile release -p pointsman-benches --bench policies -- [SEED]`.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::sync::Arc;

use pointsman_benches::{each_call, header, now, plan};
use pointsman_engine::{ComputePool, CpuConfig, CpuEngine, Model, ModelSpec, Precision, Weights};
use pointsman_sched::config::Config;
use pointsman_sched::execute::{Executor, StepOutput, StepPlan};
use pointsman_sched::ids::Micros;
use pointsman_sched::sampler::NoEdits;
use pointsman_tests::fleet::scenarios::{self, Outcome, Stage};
use pointsman_tests::fleet::{Cost, Device};

type Error = Box<dyn std::error::Error>;

/// The demo model on this machine.
struct Cpu {
    model: Arc<Model>,
    pool: ComputePool,
    cost: Cost,
}

/// An engine whose steps count so many times.
struct Timed {
    engine: CpuEngine,
    times: u64,
}

impl Device for Timed {
    fn run(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Micros {
        let start = now();
        self.engine.execute(plan, &mut NoEdits, out).unwrap_or_else(|error| panic!("{error}"));
        u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX) * self.times
    }
}

impl Stage for Cpu {
    fn cost(&self) -> Cost {
        self.cost
    }

    fn device(&self, config: &Config, times: u64) -> Box<dyn Device> {
        Box::new(Timed { engine: engine(&self.model, &self.pool, config), times })
    }
}

fn engine(model: &Arc<Model>, pool: &ComputePool, config: &Config) -> CpuEngine {
    let config = CpuConfig {
        n_blocks: config.n_blocks as usize,
        block_tokens: config.block_tokens as usize,
        max_step_tokens: config.step_tokens as usize,
        max_rows: config.max_running as usize,
        context_tokens: config.context_tokens as usize,
    };
    CpuEngine::new(Arc::clone(model), pool.clone(), config).unwrap_or_else(|error| panic!("{error}"))
}

/// Medians of a full chunk, and of decodes of one row and of a full batch at a usual length.
fn measure(engine: &mut CpuEngine) -> Cost {
    let mut median = |plan: &StepPlan| {
        let mut out = StepOutput::default();
        each_call(5, 50, || engine.execute(plan, &mut NoEdits, &mut out).unwrap_or_else(|error| panic!("{error}"))).p50
    };
    let rows = scenarios::CONFIG.max_running;
    let (one, full, chunk) = (median(&plan(1, 128, 1)), median(&plan(rows, 128, 1)), median(&plan(1, 0, 128)));
    let decode_ns = full.saturating_sub(one) / u64::from(rows - 1);
    let fixed_ns = one.saturating_sub(decode_ns);
    Cost { fixed_ns, prefill_ns: chunk.saturating_sub(fixed_ns) / 128, decode_ns }
}

fn main() -> Result<(), Error> {
    header("policies: what they are worth on the CPU engine");
    let seed = std::env::args().nth(1).and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let folder = pointsman_tests::root().join("host/app/demo/demo");
    let spec = ModelSpec::from_config(&std::fs::read(folder.join("config.json"))?)?;
    let model = Arc::new(Model::load(spec, &Weights::open(&folder)?, Precision::F16)?);
    let pool = ComputePool::start(std::thread::available_parallelism()?.get())?;
    let cost = measure(&mut engine(&model, &pool, &scenarios::CONFIG));
    println!("a step: {} ns, {} ns a prefill token, {} ns a decode", cost.fixed_ns, cost.prefill_ns, cost.decode_ns);
    let cpu = Cpu { model, pool, cost };
    for (title, scenario) in scenarios::ALL {
        let Outcome { figures, bars } = scenario(&cpu, seed);
        println!("{title}, seed {seed}");
        figures.iter().for_each(|line| println!("  {line}"));
        bars.iter().for_each(|bar| println!("  {bar}"));
    }
    Ok(())
}
