//! What the engine's tests share: random models in memory, and a driver that turns sequences into step plans.
//!
//! The driver stands in for the scheduler: it owns block tables and chunking, so that a test can vary them at will.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Model, ModelSpec, Precision, Rope, Weights};
use pointsman_sched::execute::{Executor, Row, Sample, Score, StepOutput, StepPlan};
use pointsman_sched::ids::{BlockId, RequestId};
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::{EditSource, NoEdits};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A few lines of linear congruence: test data only.
#[derive(Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Roughly normal, deviation 1.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| self.next() as f64 / (1u64 << 31) as f64).sum();
        (sum - 6.0) as f32
    }

    pub(crate) fn tokens(&mut self, n: usize, vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocab as u64) as u32).collect()
    }
}

pub(crate) fn spec() -> ModelSpec {
    let config = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 203, "hidden_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 160,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#;
    ModelSpec::from_config(config.as_bytes()).unwrap()
}

/// The same with heads of another width.
pub(crate) fn with_heads(heads: usize, kv_heads: usize, head_dim: usize) -> ModelSpec {
    let spec = spec();
    let (rope, score_scale) = (Rope { width: head_dim, ..spec.rope }, 1.0 / (head_dim as f32).sqrt());
    ModelSpec { heads, kv_heads, head_dim, rope, score_scale, ..spec }
}

/// A tensor of a random model, in `f32`.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// Every tensor of a model, rounded to `dtype`.
pub(crate) fn tensors(spec: &ModelSpec, dtype: Dtype, seed: u64) -> Vec<Named> {
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![spec.vocab, spec.hidden])];
    for layer in 0..spec.layers {
        let mut add =
            |part: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{part}.weight"), shape));
        add("input_layernorm", vec![spec.hidden]);
        add("self_attn.q_proj", vec![spec.q_dim(), spec.hidden]);
        add("self_attn.k_proj", vec![spec.kv_dim(), spec.hidden]);
        add("self_attn.v_proj", vec![spec.kv_dim(), spec.hidden]);
        add("self_attn.o_proj", vec![spec.hidden, spec.q_dim()]);
        add("post_attention_layernorm", vec![spec.hidden]);
        add("mlp.gate_proj", vec![spec.ffn, spec.hidden]);
        add("mlp.up_proj", vec![spec.ffn, spec.hidden]);
        add("mlp.down_proj", vec![spec.hidden, spec.ffn]);
    }
    shapes.push(("model.norm.weight".to_owned(), vec![spec.hidden]));
    if !spec.tied {
        shapes.push(("lm_head.weight".to_owned(), vec![spec.vocab, spec.hidden]));
    }
    let mut rng = Rng(seed);
    let mut fill = |(name, shape): (String, Vec<usize>)| {
        let is_norm = shape.len() == 1;
        let scale = if is_norm { 0.2 } else { 1.0 / (shape[1] as f32).sqrt() };
        let value = |x: f32| round_to(dtype, x * scale + if is_norm { 1.0 } else { 0.0 });
        let values = (0..shape.iter().product()).map(|_| value(rng.normal())).collect();
        Named { name, shape, values }
    };
    shapes.into_iter().map(&mut fill).collect()
}

fn round_to(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// The tensors as a safetensors file.
pub(crate) fn serialize(tensors: &[Named], dtype: Dtype) -> Vec<u8> {
    let bytes = |x: &f32| match dtype {
        Dtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    let data: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(bytes).collect()).collect();
    let view = |(t, d): (&Named, &'_ Vec<u8>)| (t.name.clone(), t.shape.clone(), d.clone());
    let owned: Vec<_> = tensors.iter().zip(&data).map(view).collect();
    let views = owned.iter().map(|(name, shape, data)| (name, TensorView::new(dtype, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

pub(crate) fn model(spec: &ModelSpec, dtype: Dtype, precision: Precision, seed: u64) -> Arc<Model> {
    let weights = Weights::from_bytes(serialize(&tensors(spec, dtype, seed), dtype)).unwrap();
    Arc::new(Model::load(spec.clone(), &weights, precision).unwrap())
}

pub(crate) fn config(model: &Model) -> EngineConfig {
    let context_tokens = model.spec().context.min(256);
    EngineConfig { n_blocks: 64, block_tokens: 16, max_step_tokens: 256, max_rows: 40, context_tokens }
}

pub(crate) fn engine(model: &Arc<Model>, pool: &ComputePool) -> CpuEngine {
    CpuEngine::new(Arc::clone(model), pool.clone(), config(model)).unwrap()
}

/// One sequence: its tokens, how many of them are computed, and its pages.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<BlockId>,
}

/// Hands out tokens and blocks as a scheduler would.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub(crate) plan: StepPlan,
}

impl Step {
    /// Adds the next `n` tokens of a sequence; the row samples when they are its last.
    pub(crate) fn push(&mut self, sequence: &Sequence, n: usize, sampling: &Arc<Sampling>) -> &mut Self {
        let plan = &mut self.plan;
        let at = |len: usize| u32::try_from(len).unwrap();
        let range = |from: usize, to: usize| -> Range<u32> { at(from)..at(to) };
        let (tokens, blocks) = (plan.tokens.len(), plan.blocks.len());
        plan.tokens.extend(&sequence.tokens[sequence.computed..sequence.computed + n]);
        plan.blocks.extend(&sequence.blocks);
        let last = sequence.computed + n == sequence.tokens.len();
        let sample = last.then(|| Sample {
            sampling: Arc::clone(sampling),
            index: 0,
            history: 0..0,
            history_prompt: 0,
            banned: None,
        });
        plan.rows.push(Row {
            request: RequestId(1 + plan.rows.len() as u64),
            tokens: range(tokens, plan.tokens.len()),
            position: at(sequence.computed),
            blocks: range(blocks, plan.blocks.len()),
            sample,
            drafts: 0,
        });
        self
    }

    /// Asks how likely each of the next `n` tokens of a sequence is after the one before it; those are the row just pushed.
    pub(crate) fn score(&mut self, sequence: &Sequence, n: usize, top: u8) -> &mut Self {
        let at = |len: usize| u32::try_from(len).unwrap();
        let (plan, first) = (&mut self.plan, sequence.computed + 1);
        let next = &sequence.tokens[first..(first + n).min(sequence.tokens.len())];
        let (start, scored) = (plan.rows.last().unwrap().tokens.start, at(plan.scored.len()));
        plan.scored.extend(next);
        if !next.is_empty() {
            let n = at(next.len());
            plan.scores.push(Score { after: start..start + n, next: scored..scored + n, top });
        }
        self
    }

    pub(crate) fn run(&mut self, engine: &mut CpuEngine) -> Vec<u32> {
        self.run_edited(engine, &mut NoEdits)
    }

    /// The same with a sampler policy; the rows' requests are 1, 2 and so on.
    pub(crate) fn run_edited(&mut self, engine: &mut CpuEngine, edits: &mut dyn EditSource) -> Vec<u32> {
        let mut out = StepOutput::default();
        engine.execute(&self.plan, edits, &mut out).unwrap();
        out.sampled.iter().map(|sampled| sampled.token).collect()
    }
}

/// Blocks `ids` for a sequence.
pub(crate) fn blocks(ids: impl IntoIterator<Item = u32>) -> Vec<BlockId> {
    ids.into_iter().map(BlockId).collect()
}

/// Tokens and logit bits of a greedy generation.
pub(crate) type Outcome = (Vec<u32>, Vec<Vec<u32>>);

/// Logits of the `row`-th row that sampled.
pub(crate) fn logit_bits(engine: &CpuEngine, row: usize) -> Vec<u32> {
    engine.logits(row).iter().map(|x| x.to_bits()).collect()
}

/// Prefills in chunks of at most `chunk` and decodes `n` tokens greedily, alone. Gives tokens and logit bits.
pub(crate) fn generate(engine: &mut CpuEngine, prompt: &[u32], chunk: usize, n: usize) -> Outcome {
    let greedy = Arc::new(Sampling::default());
    let mut sequence = Sequence { tokens: prompt.to_vec(), computed: 0, blocks: blocks(0..16) };
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    while tokens.len() < n {
        let len = chunk.min(sequence.tokens.len() - sequence.computed);
        let sampled = Step::default().push(&sequence, len, &greedy).run(engine);
        sequence.computed += len;
        if let [token] = sampled[..] {
            logits.push(logit_bits(engine, 0));
            tokens.push(token);
            sequence.tokens.push(token);
        }
    }
    (tokens, logits)
}

/// Continues behind blocks that another sequence with the same beginning computed.
pub(crate) fn from_cache(engine: &mut CpuEngine, prompt: &[u32], n: usize) -> Outcome {
    let greedy = Arc::new(Sampling::default());
    let shared = (prompt.len() - 1) / 16;
    let mut first = Sequence { tokens: prompt[..16 * shared].to_vec(), computed: 0, blocks: blocks(20..30) };
    first.tokens.extend([1, 2, 3]);
    Step::default().push(&first, first.tokens.len(), &greedy).run(engine);
    let table = (20..20 + shared as u32).chain(40..50);
    let mut second = Sequence { tokens: prompt.to_vec(), computed: 16 * shared, blocks: blocks(table) };
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    while tokens.len() < n {
        let sampled = Step::default().push(&second, second.tokens.len() - second.computed, &greedy).run(engine);
        second.computed = second.tokens.len();
        second.tokens.push(sampled[0]);
        tokens.push(sampled[0]);
        logits.push(logit_bits(engine, 0));
    }
    (tokens, logits)
}
