//! Steps of the CPU engine in process: decode at several batch sizes and a prefill, beside what the machine can do.
//!
//! `cargo bench --profile release -p pointsman-benches --bench decode -- [FOLDER] [--gguf FILE]... [--llama FOLDER] [--files-only]
//! [--isa NAME]`
//!
//! First the small model in FOLDER, without one the demo model: throughput at 32 sequences over 1. Bar: 4x. Then a Llama of
//! 1.1 billion parameters (16 layers, hidden 2048, feed-forward 8192, 32 query and 8 key heads of 64, 32,000 tokens): made
//! in memory from pseudo-random numbers, as Q8_0 and F16, and each GGUF file of that shape. Speed does not depend on the values.
//!
//! The floor is the packed weights once and the KV of every row once, at the read bandwidth of the same run: all threads over
//! 512 MB. The peak is two operations per multiply-add of 8-bit products in registers, likewise. Weights that fit a cache can
//! beat the floor. Peak memory is that of the process since the model's load began.
//!
//! `--files-only` leaves out what needs no file. `--isa` takes the kernels of slower instructions than the fastest: `avx512-vnni`,
//! `avx2-fma` or `portable`.
//!
//! With `--llama`, the programs `llama-bench` and `llama-batched-bench` in that folder run on the same GGUF files with as many
//! threads, for comparison. llama.cpp is not part of this repository. Its AMX kernels need a compiler barrier before
//! `_tile_loadconfig` with some compilers. On a busy machine everything here is slower, and programs that spin most of all.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use pointsman_benches::{Samples, header, now, plan, readable, synthetic};
use pointsman_engine::backend::cpu::Isa;
use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Model, ModelSpec, Precision, Weights};
use pointsman_sched::execute::{Executor, StepOutput, StepPlan};
use pointsman_sched::sampler::NoEdits;

type Error = Box<dyn std::error::Error>;

/// Positions that each sequence has behind it.
const CONTEXT: u32 = 128;
/// Tokens of a large model's prefill.
const PREFILL: u32 = 512;
/// Time for each line.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// Steps for each line, at least.
const AT_LEAST: usize = 5;

/// What the machine can do.
#[derive(Clone, Copy)]
struct Limits {
    bytes_per_s: f64,
    products_per_s: f64,
}

/// What the command line asks for.
struct Arguments {
    folder: PathBuf,
    files: Vec<PathBuf>,
    llama: Option<PathBuf>,
    files_only: bool,
    isa: Isa,
}

/// Threads with the kernels that were asked for.
#[derive(Clone, Copy)]
struct Threads {
    n: usize,
    isa: Isa,
}

fn main() -> Result<(), Error> {
    header("decode: steps of the CPU engine");
    let arguments = Arguments::read()?;
    let cores = Threads { n: std::thread::available_parallelism()?.get(), isa: arguments.isa };
    let small_on = if arguments.files_only { vec![] } else { vec![Threads { n: 1, ..cores }, cores] };
    for threads in small_on {
        let limits = Limits::measure(&threads.pool()?);
        for precision in [Precision::F16, Precision::Q8_0] {
            small(&arguments.folder, precision, threads, limits)?;
        }
    }
    let in_memory: &[_] = if arguments.files_only { &[] } else { &[Precision::Q8_0, Precision::F16] };
    for &precision in in_memory {
        println!("\nLlama of 1.1 billion parameters in memory, as {precision:?}");
        reset_peak();
        large(Weights::from_bytes(synthetic::llama())?, precision, cores)?;
    }
    for file in &arguments.files {
        println!("\n{}", file.display());
        reset_peak();
        large(Weights::open(file)?, Precision::F16, cores)?;
        if let Some(folder) = &arguments.llama {
            llama(folder, file, cores.n)?;
        }
    }
    Ok(())
}

fn small(folder: &Path, precision: Precision, threads: Threads, limits: Limits) -> Result<(), Error> {
    let spec = ModelSpec::from_config(&std::fs::read(folder.join("config.json"))?)?;
    let mut engine = engine(Model::load(spec, &Weights::open(folder)?, precision)?, threads, 64, CONTEXT)?;
    println!("{precision:?}, {} bytes of weights", engine.model().bytes());
    let mut rate = [0.0; 2];
    for rows in [1, 2, 4, 8, 16, 32, 64] {
        let tokens_per_s = decode(&mut engine, rows, limits)?;
        match rows {
            1 => rate[0] = tokens_per_s,
            32 => rate[1] = tokens_per_s,
            _ => {}
        }
    }
    prefill(&mut engine, CONTEXT, limits)?;
    let ratio = rate[1] / rate[0];
    println!("  32 rows over 1: {ratio:.2}x   bar 4x {}", if ratio >= 4.0 { "met" } else { "MISSED" });
    Ok(())
}

fn large(weights: Weights, precision: Precision, threads: Threads) -> Result<(), Error> {
    let start = now();
    let model = Model::load(ModelSpec::from_config(synthetic::CONFIG.as_bytes())?, &weights, precision)?;
    drop(weights);
    println!("  loaded in {:.1?}, {} MB of weights", start.elapsed(), model.bytes() >> 20);
    let limits = Limits::measure(&threads.pool()?);
    let mut engine = engine(model, threads, 32, PREFILL)?;
    prefill(&mut engine, PREFILL, limits)?;
    let mut rate = [0.0; 3];
    for (rate, rows) in rate.iter_mut().zip([1, 8, 32]) {
        *rate = decode(&mut engine, rows, limits)?;
    }
    let ratio = rate[2] / rate[0];
    println!("  32 rows over 1: {ratio:.2}x   bar 4x {}", if ratio >= 4.0 { "met" } else { "MISSED" });
    println!("  peak memory {} MB", peak_bytes() >> 20);
    Ok(())
}

fn engine(model: Model, threads: Threads, rows: usize, step: u32) -> Result<CpuEngine, Error> {
    let pool = threads.pool()?;
    println!("{} threads, {}", threads.n, pool.isa().name());
    let config = EngineConfig {
        n_blocks: rows * (CONTEXT as usize + 16).div_ceil(16) + step as usize / 16,
        block_tokens: 16,
        max_step_tokens: 512,
        max_rows: rows,
        context_tokens: model.spec().context.min(1_024),
    };
    Ok(CpuEngine::new(Arc::new(model), pool, config)?)
}

/// Tokens per second of `rows` sequences.
fn decode(engine: &mut CpuEngine, rows: u32, limits: Limits) -> Result<f64, Error> {
    let p50 = median(engine, &plan(rows, CONTEXT, 1))?;
    let (weights, spec) = (engine.model().read_bytes(), engine.model().spec());
    let kv = rows as usize * CONTEXT as usize * spec.layers * spec.kv_dim() * 2 * 4;
    let floor = (weights + kv) as f64 / limits.bytes_per_s;
    let (tokens_per_s, share) = (f64::from(rows) / p50.as_secs_f64(), floor / p50.as_secs_f64() * 100.0);
    println!(
        "  decode {rows:>3} rows at {CONTEXT}: p50 {:>9}, {tokens_per_s:>8.1} tokens/s, {share:>4.0} % of the floor",
        readable(u64::try_from(p50.as_nanos())?)
    );
    Ok(tokens_per_s)
}

fn prefill(engine: &mut CpuEngine, tokens: u32, limits: Limits) -> Result<(), Error> {
    let p50 = median(engine, &plan(1, 0, tokens))?;
    let tokens_per_s = f64::from(tokens) / p50.as_secs_f64();
    let spec = engine.model().spec();
    let layer = spec.hidden * (2 * spec.q_dim() + 2 * spec.kv_dim() + 3 * spec.ffn);
    let share = tokens_per_s * (layer * spec.layers) as f64 / limits.products_per_s * 100.0;
    println!("  prefill {tokens} tokens: p50 {p50:.1?}, {tokens_per_s:.0} tokens/s, {share:.0} % of the 8-bit peak");
    Ok(())
}

fn median(engine: &mut CpuEngine, plan: &StepPlan) -> Result<Duration, Error> {
    let mut out = StepOutput::default();
    let mut samples = Samples::default();
    engine.execute(plan, &mut NoEdits, &mut out)?;
    let (begin, mut n) = (now(), 0);
    while n < AT_LEAST || begin.elapsed() < PATIENCE {
        let start = now();
        engine.execute(plan, &mut NoEdits, &mut out)?;
        samples.add(start.elapsed());
        n += 1;
    }
    Ok(Duration::from_nanos(samples.percentiles().p50))
}

/// Runs llama.cpp's benchmarks on a file.
fn llama(folder: &Path, file: &Path, threads: usize) -> Result<(), Error> {
    let (threads, prefill) = (threads.to_string(), PREFILL.to_string());
    let mut bench = Command::new(folder.join("llama-bench"));
    bench.args(["-t", &threads, "-p", &prefill, "-n", "32", "-r", "3", "-o", "jsonl", "-m"]).arg(file);
    for line in lines(bench)? {
        let what = if line["n_prompt"] == 0 { "decode   1 row" } else { "prefill" };
        println!("  llama.cpp {what}: {:.1} tokens/s", line["avg_ts"].as_f64().unwrap_or(f64::NAN));
    }
    let mut batched = Command::new(folder.join("llama-batched-bench"));
    let context = CONTEXT.to_string();
    batched.args(["-t", &threads, "-c", "8192", "-npp", &context, "-ntg", "16", "-npl", "8,32"]);
    batched.args(["--output-format", "jsonl", "-m"]).arg(file);
    for line in lines(batched)? {
        let speed = line["speed_tg"].as_f64().unwrap_or(f64::NAN);
        println!("  llama.cpp decode {:>3} rows: {speed:.1} tokens/s", line["pl"]);
    }
    Ok(())
}

/// The lines of JSON that a program prints.
fn lines(mut program: Command) -> Result<Vec<serde_json::Value>, Error> {
    let out = program.output().map_err(|e| format!("cannot run {program:?}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{program:?} failed: {}", String::from_utf8_lossy(&out.stderr)).into());
    }
    Ok(String::from_utf8(out.stdout)?.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Forgets the peak of this process's memory so far; where the system cannot, the figure stays that of the whole run.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Most memory that this process has had, in bytes.
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<usize>().map_or(0, |kib| kib << 10)
}

// === impl Threads ===

impl Threads {
    fn pool(self) -> Result<ComputePool, Error> {
        Ok(ComputePool::with_isa(self.n, self.isa)?)
    }
}

// === impl Limits ===

impl Limits {
    fn measure(pool: &ComputePool) -> Self {
        // Written, or the system would map one page of zeros everywhere.
        let data = vec![[1.0; 16]; 8 << 20];
        let reads = best(|| {
            std::hint::black_box(pool.read(&data));
            (data.len() * 64) as u64
        });
        let products = best(|| pool.multiply(2_000_000));
        println!(
            "{} threads can read {:.1} GB/s and make {:.2} 8-bit TOPS ({})",
            pool.n_threads(),
            reads / 1e9,
            2.0 * products / 1e12,
            pool.isa().name()
        );
        Self { bytes_per_s: reads, products_per_s: products }
    }
}

/// The best rate of a few runs of something that returns how much it did.
fn best(mut run: impl FnMut() -> u64) -> f64 {
    let rate = |_| {
        let start = now();
        run() as f64 / start.elapsed().as_secs_f64()
    };
    (0..5).map(rate).fold(0.0, f64::max)
}

// === impl Arguments ===

impl Arguments {
    /// Reads the command line; `--bench`, which cargo adds, is passed over.
    fn read() -> Result<Self, Error> {
        let demo = pointsman_tests::root().join("host/app/demo/demo");
        let mut found = Self { folder: demo, files: Vec::new(), llama: None, files_only: false, isa: Isa::best() };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--gguf" => found.files.extend(arguments.next().map(PathBuf::from)),
                "--llama" => found.llama = arguments.next().map(PathBuf::from),
                "--files-only" => found.files_only = true,
                "--isa" => {
                    let (wanted, has) = (arguments.next().unwrap_or_default(), Isa::available());
                    let isa = has.iter().find(|isa| isa.name() == wanted);
                    let names: Vec<&str> = has.iter().map(|isa| isa.name()).collect();
                    found.isa = *isa.ok_or_else(|| format!("no `{wanted}` here: --isa takes one of {names:?}"))?;
                }
                flag if flag.starts_with("--") => {}
                folder => found.folder = PathBuf::from(folder),
            }
        }
        Ok(found)
    }
}
