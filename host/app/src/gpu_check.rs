//! `pointsman gpu-check`: whether a GPU computes what the CPU does, how fast it decodes, and whether it gives memory back.
//!
//! One command for a machine that is at hand for minutes: it needs a driver and nothing else, prints a table as it goes and
//! writes the same as JSON. Figures stand beside the floor that a plain streaming read reaches in the same run. The
//! models are random: speed depends on shapes alone. It ends with a fault when a comparison fails, never because of a figure.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use pointsman_engine::cuda::{
    self, Bytes, CodeOptions, CudaEngine, CudaOptions, Device, DeviceLaunch, Element, FoundGpu, Gpu, NoGpu, ParityCase,
    Source, Value,
};
use pointsman_engine::{ComputePool, EngineConfig, ModelSpec};
use pointsman_sched::execute::{Executor, Row, Sample, StepOutput, StepPlan};
use pointsman_sched::ids::{BlockId, RequestId};
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::NoEdits;
use serde_json::{Value as Json, json};

use crate::cli::GpuCheckArgs;
use crate::clock::SystemClock;
use crate::devices;

/// Steps of a figure: the median of so many, after a few that warm up.
const STEPS: usize = 20;
const WARM_UP: usize = 3;
/// What the streaming read reads.
const STREAM_BYTES: u64 = 4 << 30;
/// What a model must give back when it is unloaded.
const RETURNED: f64 = 0.99;

/// Rows and context of the decode figures.
const CURVE: [(usize, usize); 10] = [
    (1, 1_024),
    (2, 1_024),
    (4, 1_024),
    (8, 1_024),
    (16, 1_024),
    (32, 1_024),
    (64, 1_024),
    (128, 1_024),
    (8, 4_096),
    (64, 4_096),
];

struct Check<'a> {
    out: &'a mut dyn Write,
    clock: SystemClock,
    gpu: FoundGpu,
    code: CodeOptions,
    /// The model of the figures.
    large: ModelSpec,
    faults: u32,
    lines: Vec<Json>,
}

/// Runs all of it.
///
/// # Errors
/// There is no such GPU, something could not be run, or a comparison failed.
pub(crate) fn run(args: &GpuCheckArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let gpu = find(args.gpu)?;
    let mut folders = args.cuda_lib_dir.clone();
    folders.extend(devices::usual_folders());
    let cache = args.cache.clone().unwrap_or_else(|| std::env::temp_dir().join("pointsman-cubin"));
    let code = CodeOptions { folders, cache: Some(cache), ptx_only: args.ptx };
    let large = ModelSpec::from_config(LLAMA_8B.as_bytes())?;
    let mut check = Check { out, clock: SystemClock::start(), gpu, code, large, faults: 0, lines: Vec::new() };
    let outcome = check.all(args);
    check.write_json(args.json.as_ref())?;
    outcome?;
    match check.faults {
        0 => Ok(()),
        faults => bail!("{faults} checks failed"),
    }
}

fn find(asked: u32) -> Result<FoundGpu, NoGpu> {
    let gpus = cuda::discover()?;
    let count = u32::try_from(gpus.len()).unwrap_or(u32::MAX);
    gpus.into_iter().find(|gpu| gpu.ordinal == asked).ok_or(NoGpu::NoSuch { asked, count })?.supported()
}

/// Llama-3.1-8B.
const LLAMA_8B: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}"#;

/// The largest step of the figures and pages for them, as many as fit.
fn config(n_blocks: usize) -> EngineConfig {
    EngineConfig { n_blocks, block_tokens: 16, max_step_tokens: 2_048, max_rows: 128, context_tokens: 4_224 }
}

/// `rows` decodes of sequences with `context` positions; pages are shared where there are too few.
fn decode_plan(rows: usize, context: usize, n_blocks: usize) -> StepPlan {
    let mut plan = StepPlan::default();
    let pages = (context + 1).div_ceil(16);
    for row in 0..rows {
        let (token, first) = (plan.tokens.len() as u32, plan.blocks.len() as u32);
        plan.tokens.push((row * 97 + 11) as u32);
        plan.blocks.extend((0..pages).map(|page| BlockId(((row * pages + page) % n_blocks) as u32)));
        plan.rows.push(Row {
            request: RequestId(1 + row as u64),
            tokens: token..token + 1,
            position: context as u32,
            blocks: first..plan.blocks.len() as u32,
            sample: Some(Sample {
                sampling: Arc::new(Sampling::default()),
                index: 0,
                history: 0..0,
                history_prompt: 0,
                banned: None,
            }),
        });
    }
    plan
}

/// One prompt of `tokens`.
fn prefill_plan(tokens: usize, n_blocks: usize) -> StepPlan {
    let mut plan = decode_plan(1, tokens - 1, n_blocks);
    plan.tokens = (0..tokens as u32).map(|i| i * 37 % 1_000).collect();
    plan.rows[0].tokens = 0..tokens as u32;
    plan.rows[0].position = 0;
    plan
}

impl Check<'_> {
    fn all(&mut self, args: &GpuCheckArgs) -> anyhow::Result<()> {
        let FoundGpu { info, total_bytes, driver, ordinal, .. } = self.gpu.clone();
        let (major, minor) = info.capability;
        let what = format!(
            "cuda:{ordinal}: {}, {} multiprocessors, compute capability {major}.{minor}, {}, driver for CUDA {}.{}",
            info.name,
            info.n_sms,
            Bytes(total_bytes),
            driver.0,
            driver.1
        );
        self.say(
            &what,
            json!({"device": info.name, "sms": info.n_sms, "total_bytes": total_bytes, "driver": [driver.0, driver.1]}),
        )?;
        self.parity()?;
        if args.parity_only {
            return Ok(());
        }
        let bandwidth = self.stream()?;
        // Holds the context, so that what a model gives back can be measured from outside.
        let mut keeper = self.open(false)?;
        let before = keeper.memory()?.free;
        let mut during = before;
        for (stage, graphs, overlap) in
            [("eager", false, false), ("graph", true, false), ("graph, overlapping launches", true, true)]
        {
            let mut engine = self.large(graphs, overlap)?;
            during = keeper.memory()?.free;
            self.ladder(stage, &mut engine, bandwidth)?;
            if overlap {
                self.curves(&mut engine, bandwidth)?;
            }
        }
        let returned =
            (keeper.memory()?.free.saturating_sub(during)) as f64 / before.saturating_sub(during).max(1) as f64;
        let good = returned >= RETURNED;
        self.judge(
            good,
            &format!("memory returned after unload: {:.2} %", returned * 100.0),
            json!({"returned": returned}),
        )
    }

    fn open(&self, overlap: bool) -> anyhow::Result<Gpu> {
        Ok(Gpu::open(self.gpu.clone(), self.code.clone(), overlap)?)
    }

    fn parity(&mut self) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = ComputePool::start(cores.min(8))?;
        for overlap in [false, true] {
            for case in ParityCase::all() {
                let device = Box::new(self.open(overlap)?);
                let ModelSpec { head_dim, heads, kv_heads, .. } = case.spec()?;
                let mut what = format!("parity {}, {heads} heads of {head_dim} on {kv_heads}", case.element);
                if overlap {
                    what.push_str(", overlapping launches");
                }
                match case.run(device, &pool) {
                    Ok(parity) => {
                        let words = format!(
                            "{what}: logits within {:.1e} (bound {:.0e}), {} of {} tokens differ",
                            parity.worst, parity.bound, parity.other_tokens, parity.tokens
                        );
                        let json = json!({"parity": what, "worst": parity.worst, "other_tokens": parity.other_tokens});
                        self.judge(parity.is_good(), &words, json)?;
                    }
                    Err(error) => self.judge(false, &format!("{what}: {error}"), json!({"parity": what}))?,
                }
            }
        }
        Ok(())
    }

    /// Bytes a second of a kernel that does nothing but read.
    fn stream(&mut self) -> anyhow::Result<f64> {
        let mut gpu = self.open(false)?;
        let grid = self.gpu.info.n_sms * 16;
        let (from, out) = (gpu.allocate(STREAM_BYTES)?, gpu.allocate(u64::from(grid) * 4)?);
        gpu.load(&[(0, "read_stream".to_owned())])?;
        let args = [Value::Address(from), Value::U64(STREAM_BYTES), Value::Address(out)];
        let launch = DeviceLaunch { kernel: 0, grid: [grid, 1, 1], block: 256, shared: 0, args: &args };
        let mut times = Vec::new();
        for _ in 0..WARM_UP + STEPS {
            let start = self.clock.nanos();
            gpu.launch(&launch)?;
            gpu.wait()?;
            times.push(self.clock.nanos() - start);
        }
        let bandwidth = STREAM_BYTES as f64 / median(&mut times[WARM_UP..]);
        self.say(&format!("streaming read: {:.0} GB/s", bandwidth / 1e9), json!({"stream_bytes_per_s": bandwidth}))?;
        Ok(bandwidth)
    }

    fn large(&mut self, graphs: bool, overlap: bool) -> anyhow::Result<CudaEngine> {
        let mut gpu = self.open(overlap)?;
        let (memory, sms) = (gpu.memory()?, self.gpu.info.n_sms);
        let wish = cuda::KvWish::Share(1);
        let plan = cuda::plan_memory(&self.large, &[Element::Bf16], config(1), (memory, sms), wish)?;
        let config = config(plan.n_blocks as usize);
        let options = CudaOptions { element: Element::Bf16, graphs };
        let model = (self.large.clone(), Source::Random(1));
        let mut engine = CudaEngine::load(Box::new(gpu), model, config, options, &mut |_| {})?;
        let notes: Vec<String> = engine.device().notes().to_vec();
        notes.iter().try_for_each(|note| self.say(note, json!({"note": note})))?;
        Ok(engine)
    }

    /// Seconds of a step.
    fn time(&mut self, engine: &mut CudaEngine, plan: &StepPlan) -> anyhow::Result<f64> {
        let mut out = StepOutput::default();
        let mut times = Vec::new();
        for _ in 0..WARM_UP + STEPS {
            let start = self.clock.nanos();
            engine.execute(plan, &mut NoEdits, &mut out)?;
            times.push(self.clock.nanos() - start);
        }
        Ok(median(&mut times[WARM_UP..]))
    }

    /// Batch 1: the weights once, and little else.
    fn ladder(&mut self, stage: &str, engine: &mut CudaEngine, bandwidth: f64) -> anyhow::Result<()> {
        let n_blocks = engine.config().n_blocks;
        let seconds = self.time(engine, &decode_plan(1, 128, n_blocks))?;
        self.figure(&format!("8B bf16, batch 1, {stage}"), (1, 128), seconds, bandwidth)
    }

    fn curves(&mut self, engine: &mut CudaEngine, bandwidth: f64) -> anyhow::Result<()> {
        let n_blocks = engine.config().n_blocks;
        for (rows, context) in CURVE {
            let seconds = self.time(engine, &decode_plan(rows, context, n_blocks))?;
            self.figure(&format!("8B bf16, {rows} x {context}"), (rows, context), seconds, bandwidth)?;
        }
        let tokens = engine.config().max_step_tokens;
        let seconds = self.time(engine, &prefill_plan(tokens, n_blocks))?;
        let flops = 2.0 * 6.98e9 * tokens as f64 / seconds;
        let words = format!(
            "8B bf16, prefill of {tokens}: {:.0} tokens/s, {:.0} TFLOP/s",
            tokens as f64 / seconds,
            flops / 1e12
        );
        self.say(&words, json!({"prefill_tokens": tokens, "seconds": seconds}))
    }

    /// A decode step beside what reading its weights and keys would take.
    fn figure(
        &mut self,
        what: &str,
        (rows, context): (usize, usize),
        seconds: f64,
        bandwidth: f64,
    ) -> anyhow::Result<()> {
        let spec = &self.large;
        // The embedding is read by the row, not whole.
        let layer = spec.hidden * (2 * spec.q_dim() + 2 * spec.kv_dim() + 3 * spec.ffn);
        let weights = 2 * (spec.layers * layer + spec.vocab * spec.hidden);
        let kv = rows * context * spec.layers * spec.kv_dim() * 2 * 2;
        let floor = (weights + kv) as f64 / bandwidth;
        let words = format!(
            "{what}: {:.3} ms, {:.0} tokens/s, {:.1} % of the floor ({:.3} ms)",
            seconds * 1e3,
            rows as f64 / seconds,
            floor / seconds * 100.0,
            floor * 1e3
        );
        self.say(&words, json!({"figure": what, "rows": rows, "context": context, "seconds": seconds, "floor": floor}))
    }

    fn judge(&mut self, good: bool, words: &str, mut json: Json) -> anyhow::Result<()> {
        self.faults += u32::from(!good);
        json["good"] = good.into();
        self.say(&format!("{} {words}", if good { "good  " } else { "FAILED" }), json)
    }

    fn say(&mut self, words: &str, json: Json) -> anyhow::Result<()> {
        self.lines.push(json);
        Ok(writeln!(self.out, "{words}")?)
    }

    fn write_json(&self, path: Option<&PathBuf>) -> anyhow::Result<()> {
        let Some(path) = path else { return Ok(()) };
        let all = json!({"version": env!("CARGO_PKG_VERSION"), "faults": self.faults, "lines": self.lines});
        std::fs::write(path, format!("{all:#}\n")).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// In seconds, of nanoseconds.
fn median(nanos: &mut [u64]) -> f64 {
    nanos.sort_unstable();
    nanos.get(nanos.len() / 2).copied().unwrap_or(0) as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_of_the_figures_are_within_the_engines_bounds() {
        for n_blocks in [300, 40_000] {
            let config = config(n_blocks);
            let decodes = CURVE.map(|(rows, context)| decode_plan(rows, context, n_blocks));
            for plan in decodes.into_iter().chain([prefill_plan(config.max_step_tokens, n_blocks)]) {
                assert!(plan.rows.len() <= config.max_rows && plan.tokens.len() <= config.max_step_tokens);
                for row in &plan.rows {
                    let end = row.position as usize + row.tokens.len();
                    assert!(end <= config.context_tokens && end <= row.blocks.len() * config.block_tokens);
                    assert!(plan.blocks_of(row).iter().all(|block| (block.0 as usize) < n_blocks));
                }
            }
        }
    }

    #[test]
    fn the_median_is_in_seconds() {
        assert!((median(&mut [3_000, 1_000, 2_000]) - 2e-6).abs() < 1e-12);
    }
}
