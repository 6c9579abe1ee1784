//! Times steps of the CPU engine: decode at several batch sizes and a prefill, with their share of the memory floor.
//!
//! `cargo run --release -p pointsman-engine --example decode -- [FOLDER] [f16|q8_0] [threads] [context]`; without a folder, the
//! demo model. Prints the best of many steps: the machine's own speed, not its neighbours' load.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a measuring tool: reads the clock, prints a table"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pointsman_engine::{ComputePool, CpuConfig, CpuEngine, Model, ModelSpec, Precision, Weights};
use pointsman_sched::execute::{Executor, Row, Sample, StepOutput, StepPlan};
use pointsman_sched::ids::{BlockId, RequestId};
use pointsman_sched::request::Sampling;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../app/demo/demo");
    let folder = PathBuf::from(args.next().unwrap_or_else(|| demo.to_owned()));
    let precision = if args.next().as_deref() == Some("q8_0") { Precision::Q8_0 } else { Precision::F16 };
    let n_threads = args.next().map_or(Ok(2), |n| n.parse())?;
    let context: u32 = args.next().map_or(Ok(128), |n| n.parse())?;

    let spec = ModelSpec::from_config(&std::fs::read(folder.join("config.json"))?)?;
    let start = Instant::now();
    let model = Arc::new(Model::load(spec, &Weights::open(&folder)?, precision)?);
    println!("{}: {:?}, {} bytes, loaded in {:?}", folder.display(), precision, model.bytes(), start.elapsed());
    let pool = ComputePool::start(n_threads)?;
    println!("{} threads, {}", pool.n_threads(), pool.isa().name());
    let config = CpuConfig {
        n_blocks: 64 * (context as usize + 16).div_ceil(16),
        block_tokens: 16,
        max_step_tokens: 512,
        max_rows: 64,
        context_tokens: model.spec().context,
    };
    let mut engine = CpuEngine::new(model, pool, config)?;
    for rows in [1, 2, 4, 8, 16, 32, 64] {
        let time = best(&mut engine, &plan(rows, context, 1))?;
        println!(
            "decode {rows:3} rows at {context}: {time:9.1?}, {:8.0} tokens/s",
            f64::from(rows) / time.as_secs_f64()
        );
    }
    for tokens in [64, context.min(512)] {
        let time = best(&mut engine, &plan(1, 0, tokens))?;
        println!("prefill {tokens:3} tokens: {time:9.1?}, {:8.0} tokens/s", f64::from(tokens) / time.as_secs_f64());
    }
    Ok(())
}

/// `rows` sequences, each computing `n` tokens from `position` on.
fn plan(rows: u32, position: u32, n: u32) -> StepPlan {
    let mut plan = StepPlan::default();
    let per_row = (position + n).div_ceil(16);
    for row in 0..rows {
        plan.tokens.extend((0..n).map(|i| (7 * row + 31 * i + 11) % 2_000));
        plan.blocks.extend((row * per_row..(row + 1) * per_row).map(BlockId));
        let sampling = Arc::new(Sampling::default());
        plan.rows.push(Row {
            request: RequestId(u64::from(row) + 1),
            tokens: row * n..(row + 1) * n,
            position,
            blocks: row * per_row..(row + 1) * per_row,
            sample: Some(Sample { sampling, index: 0, history: 0..0, history_prompt: 0, banned: None }),
        });
    }
    plan
}

fn best(engine: &mut CpuEngine, plan: &StepPlan) -> Result<Duration, Error> {
    let mut out = StepOutput::default();
    let mut best = Duration::MAX;
    let end = Instant::now() + Duration::from_millis(700);
    while Instant::now() < end {
        let start = Instant::now();
        engine.execute(plan, &mut out)?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}
