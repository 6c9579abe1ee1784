//! How long decode steps of an 8B model and of one with experts take, beside what reading the same bytes takes; and whether a model's
//! memory comes back.

use std::sync::Arc;

use anyhow::bail;
use pointsman_engine::cuda::{
    self, CudaEngine, CudaOptions, Device, DeviceLaunch, Element, Form, GemmChoice, Gpu, KvWish, LibraryUse, Source,
    Value,
};
use pointsman_engine::{EngineConfig, ModelSpec, Precision};
use pointsman_sched::execute::{Executor, InHalves, Row, Sample, StepOutput, StepPlan};
use pointsman_sched::ids::{BlockId, RequestId};
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::NoEdits;
use serde_json::json;

use super::Check;
use super::report::Figure;

/// A figure is the median of so many steps, after as many as fill this time: clocks rise slowly.
const STEPS: usize = 30;
const WARM_NANOS: u64 = 300_000_000;

/// What the streaming read reads, how often before it is waited for, and blocks for each multiprocessor that it is tried with.
const STREAM_BYTES: u64 = 4 << 30;
const STREAM_LAUNCHES: u64 = 8;
const STREAM_BLOCKS: [u32; 4] = [4, 8, 16, 32];

/// What a model must give back when it is unloaded.
const RETURNED: f64 = 0.99;

/// Rows and context of steps that every stage of the ladder is measured with, and of the last stage's other ones, the most
/// important first.
const STAGE: [(usize, usize); 2] = [(1, 128), (32, 1_024)];
const CURVE: [(usize, usize); 9] =
    [(1, 1_024), (8, 1_024), (64, 1_024), (2, 1_024), (4, 1_024), (16, 1_024), (128, 1_024), (8, 4_096), (64, 4_096)];

/// Rows and their mean context, of which one has half of all: as much to read as where they are as long as each other.
const UNEVEN: (usize, usize) = (32, 256);

/// A job as `peers.py` has it: prompts, their tokens, and the tokens that each gets; and how often it is done.
const JOB: (usize, usize, usize) = (32, 1_024, 128);
const JOBS: usize = 2;

/// What the same is measured with where weights have 8 bits.
const IN_8_BITS: [(usize, usize); 3] = [(1, 128), (8, 1_024), (32, 1_024)];

/// Activations and pages in two bytes, and weights too.
pub(super) const BF16: Form = Form { element: Element::Bf16, precision: Precision::F16 };

/// A model of random weights: what it is called, and its `config.json`.
type Large = (&'static str, &'static str);

/// Of the size of Qwen3-30B-A3B, measured with weights in FP8.
const QWEN3_30B: Large = (
    "30B of which 3B are active",
    r#"{"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": true, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": false}"#,
);

/// Llama-3.1-8B.
const LLAMA_8B: Large = (
    "8B",
    r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}"#,
);

/// The largest step of the figures and pages for them, as many as fit.
fn config(n_blocks: usize) -> EngineConfig {
    EngineConfig { n_blocks, block_tokens: 16, max_step_tokens: 2_048, max_rows: 128, context_tokens: 4_224 }
}

/// So many rows of so many positions each.
fn even((rows, context): (usize, usize)) -> Vec<usize> {
    vec![context; rows]
}

/// The same with one row that has half of all positions.
fn uneven((rows, context): (usize, usize)) -> Vec<usize> {
    let half = rows * context / 2;
    [vec![half], vec![half / (rows - 1); rows - 1]].concat()
}

/// Decodes of sequences with these positions; pages are shared where there are too few.
fn decode_plan(contexts: &[usize], n_blocks: usize) -> StepPlan {
    let mut plan = StepPlan::default();
    for (row, &context) in contexts.iter().enumerate() {
        let (token, first) = (plan.tokens.len() as u32, plan.blocks.len());
        plan.tokens.push((row * 97 + 11) as u32);
        let pages = first..first + (context + 1).div_ceil(16);
        plan.blocks.extend(pages.map(|page| BlockId((page % n_blocks) as u32)));
        plan.rows.push(Row {
            request: RequestId(1 + row as u64),
            tokens: token..token + 1,
            position: context as u32,
            blocks: first as u32..plan.blocks.len() as u32,
            sample: Some(Sample {
                sampling: Arc::new(Sampling::default()),
                index: 0,
                history: 0..0,
                history_prompt: 0,
                banned: None,
            }),
            drafts: 0,
        });
    }
    plan
}

/// So many prompts of `tokens` each.
fn prefill_plan(prompts: usize, tokens: usize, n_blocks: usize) -> StepPlan {
    let mut plan = decode_plan(&vec![tokens - 1; prompts], n_blocks);
    plan.tokens = (0..(prompts * tokens) as u32).map(|i| i * 37 % 1_000).collect();
    for (i, row) in plan.rows.iter_mut().enumerate() {
        row.tokens = (i * tokens) as u32..((i + 1) * tokens) as u32;
        row.position = 0;
    }
    plan
}

/// The steps of a job: its prompts, as many at once as a step has tokens for, and one token of each after another.
fn job_plans((prompts, tokens, new): (usize, usize, usize), config: &EngineConfig) -> (Vec<StepPlan>, Vec<StepPlan>) {
    let at_once = (config.max_step_tokens / tokens).clamp(1, prompts);
    let prefills = (0..prompts).step_by(at_once);
    let prefills = prefills.map(|first| prefill_plan(at_once.min(prompts - first), tokens, config.n_blocks)).collect();
    // The first token of each comes with its prompt.
    let decode = |i: usize| StepPlan {
        follows: if i == 0 { Vec::new() } else { (0..prompts as u32).collect() },
        ..decode_plan(&vec![tokens + i; prompts], config.n_blocks)
    };
    (prefills, (0..new - 1).map(decode).collect())
}

/// Weights of all layers that so many rows read; of experts as many as they choose on average where each is as likely.
fn layer_weights(spec: &ModelSpec, rows: usize) -> usize {
    let chosen = spec.experts.as_ref().map_or(1.0, |experts| {
        let (count, per_token) = (experts.count as f64, experts.per_token as f64);
        count * (1.0 - (1.0 - per_token / count).powf(rows as f64))
    });
    let ffn = (3.0 * spec.ffn as f64 * chosen).round() as usize;
    spec.layers * spec.hidden * (2 * spec.q_dim() + 2 * spec.kv_dim() + ffn)
}

/// Bytes that a decode step of so many rows must read: weights (of the embedding a row each, and of a router, which is nothing), keys and
/// values of so many positions.
fn bytes_of(spec: &ModelSpec, precision: Precision, (rows, positions): (usize, usize)) -> u64 {
    let weights = layer_weights(spec, rows) + spec.vocab * spec.hidden;
    let scaled = match precision {
        Precision::F16 => 2 * weights,
        // A scale of two bytes for 32 of them.
        Precision::Q8_0 => weights + weights / 16,
        // One for each row.
        Precision::Fp8 => weights,
    };
    (scaled + 2 * positions * spec.layers * spec.kv_dim() * 2) as u64
}

impl Check<'_> {
    pub(super) fn ladder(&mut self) -> anyhow::Result<()> {
        let bandwidth = self.stream()?;
        let stages = [("eager", false, false), ("graph", true, false), ("graph, overlapping launches", true, true)];
        let n_stages = if self.overlaps { 3 } else { 2 };
        let mut last = None;
        for (i, (stage, graphs, overlap)) in stages.into_iter().take(n_stages).enumerate() {
            if self.is_late() {
                return self.report.skip("stages of the ladder", n_stages - i);
            }
            // What fails at one stage may work at another, and the last one that works is measured further.
            match self.stage(stage, (graphs, overlap), bandwidth) {
                Ok(()) => last = Some((stage, graphs, overlap)),
                Err(error) => self.report.judge(false, &format!("{stage}: {error:#}"), json!({"stage": stage}))?,
            }
        }
        let Some((stage, graphs, overlap)) = last else { return Ok(()) };
        let mut engine = self.asked(LLAMA_8B, BF16, (graphs, overlap))?;
        self.curves(stage, &mut engine, bandwidth)?;
        drop(engine);
        self.in_8_bits((stage, graphs, overlap), bandwidth)?;
        if self.is_late() {
            return self.report.skip("models with experts", 1);
        }
        let mut engine = self.asked(QWEN3_30B, Form { precision: Precision::Fp8, ..BF16 }, (graphs, overlap))?;
        let what = format!("{}, fp8 weights, {stage}", QWEN3_30B.0);
        IN_8_BITS.into_iter().try_for_each(|shape| self.decode(&what, &mut engine, &even(shape), bandwidth))
    }

    fn stage(&mut self, stage: &str, (graphs, overlap): (bool, bool), bandwidth: f64) -> anyhow::Result<()> {
        let mut engine = self.asked(LLAMA_8B, BF16, (graphs, overlap))?;
        STAGE.into_iter().try_for_each(|shape| self.decode(stage, &mut engine, &even(shape), bandwidth))
    }

    fn in_8_bits(&mut self, (stage, graphs, overlap): (&str, bool, bool), bandwidth: f64) -> anyhow::Result<()> {
        for precision in [Precision::Fp8, Precision::Q8_0] {
            if self.is_late() {
                return self.report.skip("precisions", 1);
            }
            let mut engine = self.asked(LLAMA_8B, Form { precision, ..BF16 }, (graphs, overlap))?;
            let what = format!("{} weights, {stage}", precision.name());
            for shape in IN_8_BITS {
                self.decode(&what, &mut engine, &even(shape), bandwidth)?;
            }
        }
        Ok(())
    }

    fn curves(&mut self, stage: &str, engine: &mut CudaEngine, bandwidth: f64) -> anyhow::Result<()> {
        self.prefill(engine)?;
        self.job(engine)?;
        let mut steps: Vec<(String, Vec<usize>)> = CURVE.map(|shape| (stage.to_owned(), even(shape))).into();
        steps.insert(3, (format!("{stage}, half of all in one row"), uneven(UNEVEN)));
        for (i, (what, contexts)) in steps.iter().enumerate() {
            if self.is_late() {
                return self.report.skip("decode figures", steps.len() - i);
            }
            self.decode(what, engine, contexts, bandwidth)?;
        }
        Ok(())
    }

    /// Bytes a second of a kernel that does nothing but read.
    pub(super) fn stream(&mut self) -> anyhow::Result<f64> {
        let mut gpu = self.open(false)?;
        let most = self.gpu.info.n_sms * STREAM_BLOCKS.into_iter().max().unwrap_or(1);
        let (from, out) = (gpu.allocate(STREAM_BYTES)?, gpu.allocate(u64::from(most) * 4)?);
        gpu.load(&[(0, "read_stream".to_owned())])?;
        let args = [Value::Address(from), Value::U64(STREAM_BYTES), Value::Address(out)];
        let mut best = 0.0f64;
        for blocks in STREAM_BLOCKS {
            let grid = [self.gpu.info.n_sms * blocks, 1, 1];
            let launch = DeviceLaunch { kernel: 0, grid, block: 256, shared: 0, args: &args };
            let seconds = self.time(|| {
                (0..STREAM_LAUNCHES).try_for_each(|_| gpu.launch(&launch))?;
                Ok(gpu.wait()?)
            })?;
            best = best.max((STREAM_BYTES * STREAM_LAUNCHES) as f64 / seconds);
        }
        self.report.say(&format!("streaming read: {:.0} GB/s", best / 1e9), json!({"stream_bytes_per_s": best}))?;
        Ok(best)
    }

    /// A model for figures, which stand under the name of what was asked for.
    fn asked(&mut self, model: Large, form: Form, (graphs, overlap): (bool, bool)) -> anyhow::Result<CudaEngine> {
        let mut engine = self.large(model, form, (graphs, overlap))?;
        if graphs && !engine.has_graphs() {
            bail!("no step is captured as a graph");
        }
        let device = engine.device();
        if overlap && !device.overlaps() {
            let why = device.notes().iter().rfind(|note| !note.contains("cuBLASLt"));
            bail!("{}", why.map_or("launches do not overlap", String::as_str));
        }
        Ok(engine)
    }

    /// Loads a model with random weights and all the pages that fit.
    fn large(
        &mut self,
        (name, config_json): Large,
        form: Form,
        (graphs, overlap): (bool, bool),
    ) -> anyhow::Result<CudaEngine> {
        let start = self.clock.nanos();
        let spec = ModelSpec::from_config(config_json.as_bytes())?;
        let mut gpu = self.open(overlap)?;
        let plan = cuda::plan_memory(&spec, &[form], config(1), gpu.room()?, KvWish::Share(1))?;
        let options = CudaOptions { form, graphs, library: LibraryUse::Faster };
        let config = config(plan.n_blocks as usize);
        let mut engine = CudaEngine::load(Box::new(gpu), (spec, Source::Random(1)), config, options, &mut |_| true)?;
        let seconds = (self.clock.nanos() - start) as f64 * 1e-9;
        self.tell_choices(engine.gemm_choices())?;
        if let Some(note) = engine.take_note() {
            self.report.say(&note, json!({"note": note}))?;
        }
        let words = format!("{name} in {form} is loaded in {seconds:.1} s: {plan}");
        self.report.say(&words, json!({"loaded": {"seconds": seconds, "bytes": engine.memory().sum()}}))?;
        Ok(engine)
    }

    /// Who computes the products of prompts, and what that was chosen by: `*` is cuBLASLt.
    fn tell_choices(&mut self, choices: &[GemmChoice]) -> anyhow::Result<()> {
        let measured = choices.iter().filter(|choice| choice.library.is_some());
        let (words, json): (Vec<String>, Vec<_>) = measured.map(shown_choice).unzip();
        if words.is_empty() {
            return self.report.say("cuBLASLt computes nothing here", json!({"cublaslt": []}));
        }
        self.report.say(
            &format!("products of prompts by cuBLASLt and by kernels, * where cuBLASLt is taken: {}", words.join(", ")),
            json!({"cublaslt": json}),
        )
    }

    /// The median of a few runs, in seconds.
    fn time(&self, mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
        let warm = self.clock.nanos() + WARM_NANOS;
        while self.clock.nanos() < warm {
            run()?;
        }
        let mut times = Vec::with_capacity(STEPS);
        for _ in 0..STEPS {
            let start = self.clock.nanos();
            run()?;
            times.push(self.clock.nanos() - start);
        }
        Ok(median(&mut times))
    }

    /// A decode step behind another and alone, and the device's part of it.
    fn decode(
        &mut self,
        stage: &str,
        engine: &mut CudaEngine,
        contexts: &[usize],
        bandwidth: f64,
    ) -> anyhow::Result<()> {
        let plan = decode_plan(contexts, engine.config().n_blocks);
        let mut out = StepOutput::default();
        let alone = self.time(|| Ok(engine.execute(&plan, &mut NoEdits, &mut out)?))?;
        let start = self.clock.nanos();
        engine.repeat_last(STEPS)?;
        let device = (self.clock.nanos() - start) as f64 * 1e-9 / STEPS as f64;
        let (rows, all) = (contexts.len(), contexts.iter().sum::<usize>());
        let follows = (0..rows as u32).collect();
        let behind = StepPlan { follows, ..decode_plan(contexts, engine.config().n_blocks) };
        engine.begin(&plan, &mut NoEdits)?;
        let seconds = self.time(|| {
            engine.begin(&behind, &mut NoEdits)?;
            Ok(engine.finish(&behind, &mut out)?)
        })?;
        engine.finish(&behind, &mut out)?;
        let floor = bytes_of(engine.spec(), engine.form().precision, (rows, all)) as f64 / bandwidth;
        let (what, context) = (stage.to_owned(), all / rows);
        self.report.figure(Figure { what, rows, context, seconds, alone, device, floor })
    }

    fn prefill(&mut self, engine: &mut CudaEngine) -> anyhow::Result<()> {
        let EngineConfig { max_step_tokens: tokens, n_blocks, .. } = *engine.config();
        let plan = prefill_plan(1, tokens, n_blocks);
        let mut out = StepOutput::default();
        let seconds = self.time(|| Ok(engine.execute(&plan, &mut NoEdits, &mut out)?))?;
        // Two operations for each weight of a layer; attention and the head are left out.
        let flops = (2 * layer_weights(engine.spec(), 1) * tokens) as f64 / seconds;
        let words = format!(
            "prefill of {tokens}: {:.1} ms, {:.0} tokens/s, {:.0} TFLOP/s in products",
            seconds * 1e3,
            tokens as f64 / seconds,
            flops / 1e12
        );
        self.report.say(&words, json!({"prefill_tokens": tokens, "seconds": seconds}))
    }

    /// Prompts and what they get, from the first to the last token, as a host does it that has them all at once.
    fn job(&mut self, engine: &mut CudaEngine) -> anyhow::Result<()> {
        let (prompts, tokens, new) = JOB;
        let (prefills, decodes) = job_plans(JOB, engine.config());
        let mut out = StepOutput::default();
        let mut seconds = f64::INFINITY;
        for _ in 0..JOBS {
            let start = self.clock.nanos();
            for plan in &prefills {
                engine.execute(plan, &mut NoEdits, &mut out)?;
            }
            engine.begin(&decodes[0], &mut NoEdits)?;
            for (before, plan) in decodes.iter().zip(&decodes[1..]) {
                engine.begin(plan, &mut NoEdits)?;
                engine.finish(before, &mut out)?;
            }
            engine.finish(&decodes[decodes.len() - 1], &mut out)?;
            seconds = seconds.min((self.clock.nanos() - start) as f64 * 1e-9);
        }
        let job = json!({"prompts": prompts, "prompt_tokens": tokens, "new_tokens": new});
        let rate = (prompts * new) as f64 / seconds;
        let words =
            format!("{prompts} prompts of {tokens} and {new} tokens for each: {seconds:.3} s, {rate:.0} tokens/s");
        self.report.job("the engine", seconds);
        self.report.say(&words, json!({"job": job, "seconds": seconds, "tokens_per_s": rate}))
    }

    /// What is free before a model is loaded, with it and after, twice: what is lost the first time may be the driver's own.
    pub(super) fn memory(&mut self, keeper: &mut Gpu) -> anyhow::Result<()> {
        for time in ["first", "second"] {
            let before = keeper.memory()?.free;
            let mut engine = self.large(LLAMA_8B, BF16, (true, true))?;
            let during = keeper.memory()?.free;
            self.halve_pool(keeper, &mut engine)?;
            let counted = engine.memory();
            drop(engine);
            let after = keeper.memory()?.free;
            let taken = before.saturating_sub(during).max(1);
            let returned = after.saturating_sub(during) as f64 / taken as f64;
            let words = format!(
                "memory after the {time} unload: {:.2} % of {} came back; weights, pages, workspace and graphs were counted as {}",
                returned * 100.0,
                cuda::Bytes(taken),
                cuda::Bytes(counted.sum())
            );
            let json =
                json!({"returned": returned, "taken": taken, "counted": counted.sum(), "graphs": counted.graphs});
            self.report.judge(returned >= RETURNED, &words, json)?;
        }
        Ok(())
    }

    /// Gives half of the pool back and takes it again, and says how long that took, for which steps wait.
    fn halve_pool(&mut self, keeper: &mut Gpu, engine: &mut CudaEngine) -> anyhow::Result<()> {
        let (all, before) = (engine.config().n_blocks as u32, engine.memory().kv);
        let free = keeper.memory()?.free;
        let start = self.clock.nanos();
        let Some(half) = engine.resize_pool(all / 2)? else {
            let words = format!("the KV pool keeps its size: {}", engine.device().notes().join("; "));
            return self.report.judge(false, &words, json!({"pool_came_back": null}));
        };
        let (shrunk, came) = (self.clock.nanos(), keeper.memory()?.free.saturating_sub(free));
        let whole = engine.resize_pool(all)?;
        let took = [shrunk - start, self.clock.nanos() - shrunk].map(|nanos| nanos as f64 * 1e-9);
        let given = before.saturating_sub(half.bytes);
        let words = format!(
            "half of the KV pool: {} of {} came back in {:.3} s, and was there again in {:.3} s",
            cuda::Bytes(came),
            cuda::Bytes(given),
            took[0],
            took[1]
        );
        let is_whole = whole.is_some_and(|whole| whole.n_blocks == all);
        let is_good = given >= before / 3 && came as f64 >= RETURNED * given as f64 && is_whole;
        self.report.judge(is_good, &words, json!({"pool_given": given, "pool_came_back": came, "seconds": took}))
    }
}

fn shown_choice(choice: &GemmChoice) -> (String, serde_json::Value) {
    let mark = if choice.is_library() { "*" } else { "" };
    let GemmChoice { product, up_to, kernels, library, .. } = choice;
    let taken = choice.is_library();
    let json = json!({"product": product, "up_to": up_to, "seconds": library, "kernels": kernels, "taken": taken});
    (format!("{choice}{mark}"), json)
}

/// In seconds, of nanoseconds.
pub(super) fn median(nanos: &mut [u64]) -> f64 {
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
            let shapes = STAGE.into_iter().chain(CURVE).chain(IN_8_BITS).map(even).chain([uneven(UNEVEN)]);
            let decodes = shapes.map(|contexts| decode_plan(&contexts, n_blocks));
            let (prefills, steps) = job_plans(JOB, &config);
            assert_eq!((prefills.len(), steps.len()), (16, 127));
            let prompts = prefills.into_iter().chain([prefill_plan(1, config.max_step_tokens, n_blocks)]);
            for plan in decodes.chain(prompts).chain(steps) {
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
    fn the_floor_counts_what_a_step_reads() {
        let spec = ModelSpec::from_config(LLAMA_8B.1.as_bytes()).expect("a Llama");
        // 7.50e9 weights without the embedding; 128 KiB of keys and values a token.
        let kv = 32 * 1_024 * 131_072;
        for (precision, rows, context, expect) in [
            (Precision::F16, 1, 0, 15_009_316_864),
            (Precision::F16, 32, 1_024, 15_009_316_864 + kv),
            (Precision::Fp8, 32, 1_024, 7_504_658_432 + kv),
            (Precision::Q8_0, 1, 0, 7_504_658_432 + 469_041_152),
        ] {
            assert_eq!(bytes_of(&spec, precision, (rows, rows * context)), expect, "{precision:?} {rows} x {context}");
        }
        // Of 128 experts one row chooses 8, two rows 15.5 on average, and many all of them.
        let spec = ModelSpec::from_config(QWEN3_30B.1.as_bytes()).expect("a Qwen3-MoE");
        let (rest, expert) = (48 * 2_048 * 9_216 + 151_936 * 2_048, 48.0 * 3.0 * 2_048.0 * 768.0);
        for (rows, experts) in [(1, 8.0), (2, 15.5), (10_000, 128.0)] {
            let expect = rest + (experts * expert) as u64;
            assert_eq!(bytes_of(&spec, Precision::Fp8, (rows, 0)), expect, "{rows} rows");
        }
    }

    #[test]
    fn the_median_is_in_seconds() {
        assert!((median(&mut [3_000, 1_000, 2_000]) - 2e-6).abs() < 1e-12);
    }
}
