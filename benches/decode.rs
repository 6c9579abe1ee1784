//! Steps of the CPU engine in process: decode at several batch sizes and a prefill, beside the memory floor, and throughput
//! at 32 sequences over 1. Bar: 4x.
//!
//! `cargo bench --profile release -p pointsman-benches --bench decode -- [FOLDER]`; without a folder, the demo model. The floor
//! is the packed weights once and the KV of every row once, at the read bandwidth that a plain sum over 256 MB reaches on
//! one thread in the same run; weights that fit a cache can beat it.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pointsman_benches::{Samples, header, now, plan, readable};
use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Model, ModelSpec, Precision, Weights};
use pointsman_sched::execute::{Executor, StepOutput, StepPlan};
use pointsman_sched::sampler::NoEdits;

type Error = Box<dyn std::error::Error>;

/// Positions that each sequence has behind it.
const CONTEXT: u32 = 128;
/// Time for each line.
const PATIENCE: Duration = Duration::from_millis(1_500);

fn main() -> Result<(), Error> {
    header("decode: steps of the CPU engine");
    let demo = pointsman_tests::root().join("host/app/demo/demo");
    let folder = std::env::args().nth(1).filter(|a| !a.starts_with("--")).map_or(demo, PathBuf::from);
    let bytes_per_s = read_bandwidth();
    println!("read bandwidth, one thread: {:.1} GB/s", bytes_per_s / 1e9);
    let cores = std::thread::available_parallelism()?.get();
    for threads in [1, cores] {
        for precision in [Precision::F16, Precision::Q8_0] {
            steps(&folder, precision, threads, bytes_per_s)?;
        }
    }
    Ok(())
}

fn steps(folder: &Path, precision: Precision, threads: usize, bytes_per_s: f64) -> Result<(), Error> {
    let spec = ModelSpec::from_config(&std::fs::read(folder.join("config.json"))?)?;
    let model = Arc::new(Model::load(spec, &Weights::open(folder)?, precision)?);
    let pool = ComputePool::start(threads)?;
    println!("{precision:?}, {} bytes of weights, {threads} threads, {}", model.bytes(), pool.isa().name());
    let (weights, layers, kv_dim) = (model.bytes(), model.spec().layers, model.spec().kv_dim());
    let config = EngineConfig {
        n_blocks: 64 * (CONTEXT as usize + 16).div_ceil(16),
        block_tokens: 16,
        max_step_tokens: 512,
        max_rows: 64,
        context_tokens: model.spec().context,
    };
    let mut engine = CpuEngine::new(model, pool, config)?;
    let mut rate = [0.0; 2];
    for rows in [1, 2, 4, 8, 16, 32, 64] {
        let p50 = median(&mut engine, &plan(rows, CONTEXT, 1))?;
        let kv = rows as usize * CONTEXT as usize * layers * kv_dim * 2 * 4;
        let floor = (weights + kv) as f64 / bytes_per_s;
        let tokens_per_s = f64::from(rows) / p50.as_secs_f64();
        let share = floor / p50.as_secs_f64() * 100.0;
        let time = readable(u64::try_from(p50.as_nanos())?);
        println!(
            "  decode {rows:>3} rows at {CONTEXT}: p50 {time:>9}, {tokens_per_s:>8.0} tokens/s, {share:>4.0} % of the floor"
        );
        match rows {
            1 => rate[0] = tokens_per_s,
            32 => rate[1] = tokens_per_s,
            _ => {}
        }
    }
    let p50 = median(&mut engine, &plan(1, 0, CONTEXT))?;
    println!("  prefill {CONTEXT} tokens: p50 {p50:.1?}, {:.0} tokens/s", f64::from(CONTEXT) / p50.as_secs_f64());
    let ratio = rate[1] / rate[0];
    println!("  32 rows over 1: {ratio:.2}x   bar 4x {}", if ratio >= 4.0 { "met" } else { "MISSED" });
    Ok(())
}

fn median(engine: &mut CpuEngine, plan: &StepPlan) -> Result<Duration, Error> {
    let mut out = StepOutput::default();
    let mut samples = Samples::default();
    let begin = now();
    while begin.elapsed() < PATIENCE {
        let start = now();
        engine.execute(plan, &mut NoEdits, &mut out)?;
        samples.add(start.elapsed());
    }
    Ok(Duration::from_nanos(samples.percentiles().p50))
}

/// Bytes per second that a sum over 256 MB reads.
fn read_bandwidth() -> f64 {
    let words = vec![1u64; 32 << 20];
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let start = now();
        std::hint::black_box(words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)));
        best = best.min(start.elapsed());
    }
    (words.len() * 8) as f64 / best.as_secs_f64()
}
