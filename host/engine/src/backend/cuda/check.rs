//! Whether a device computes what the CPU computes, on small random models of every shape that the kernels know.
//!
//! What `pointsman gpu-check` runs first on a GPU, and the tests run on the kernels' shim. Each case prefills rows of uneven
//! lengths in one step and decodes them in steps of many sizes, so that each kernel, split and bucket is met; half of the rows are
//! drawn. In `f32` the tokens must be the CPU's; in 16 bits the logits must be close.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use pointsman_sched::execute::{ExecuteError, Executor, Row, Sample, StepOutput, StepPlan};
use pointsman_sched::ids::{BlockId, RequestId};
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::NoEdits;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError};

use super::device::{Device, DeviceError};
use super::element::Element;
use super::engine::{CudaEngine, CudaError, CudaOptions};
use super::weights::Source;
use crate::backend::cpu::{ComputePool, CpuEngine, Model, Precision};
use crate::backend::{ConfigError, EngineConfig};
use crate::load::{LoadError, Weights};
use crate::spec::{ModelSpec, SpecError};

/// A model and the steps to compare on.
#[derive(Clone, Debug)]
pub struct ParityCase {
    /// The model's `config.json`.
    pub config: String,
    /// The type to compute in.
    pub element: Element,
    /// Rows of the decode steps, one after the other.
    pub rows: Vec<usize>,
    /// Of the random weights.
    pub seed: u64,
}

/// What a comparison came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parity {
    /// Steps compared.
    pub steps: usize,
    /// Tokens chosen.
    pub tokens: usize,
    /// Of those, others than the CPU's.
    pub other_tokens: usize,
    /// Largest difference of a logit, relative to the largest logit of its row.
    pub worst: f64,
    /// What that may be at most.
    pub bound: f64,
    /// Tokens that may differ at most: none in `f32`; any in 16 bits, where near ties are many.
    pub may_differ: usize,
}

/// Why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub enum ParityError {
    /// The engine could not be made.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The CPU's engine could not be made.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model is none.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The random weights cannot be read back.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The random weights cannot be written.
    #[error("writing random weights failed: {0}")]
    Weights(#[from] SafeTensorError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] ExecuteError),
    /// Logits could not be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Most rows of a case, and positions that each may have.
const MAX_ROWS: usize = 96;
const CONTEXT: usize = 64;

impl ParityCase {
    /// Every head size and group that the kernels tell apart, in every type; the types of the first one come first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let models = [
            ("LlamaForCausalLM", 32, 6, 2, ""),
            ("LlamaForCausalLM", 64, 8, 1, r#""tie_word_embeddings": false"#),
            ("Qwen2ForCausalLM", 128, 4, 4, r#""use_sliding_window": false"#),
            ("Qwen3ForCausalLM", 64, 12, 1, r#""attention_bias": false"#),
            ("MistralForCausalLM", 64, 4, 2, r#""sliding_window": 20"#),
        ];
        let of = |(architecture, head_dim, heads, kv_heads, more): (&str, usize, usize, usize, &str)| {
            let comma = if more.is_empty() { "" } else { ", " };
            let config = format!(
                r#"{{"architectures": ["{architecture}"], "vocab_size": 1003, "hidden_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": {head_dim},
                "intermediate_size": 160, "max_position_embeddings": {CONTEXT}, "rms_norm_eps": 1e-5{comma}{more}}}"#
            );
            let rows = vec![1, 2, 3, 7, 9, 17, 33, 64, 70, 96];
            Element::ALL.map(|element| Self { config: config.clone(), element, rows: rows.clone(), seed: 7 })
        };
        models.into_iter().flat_map(of).collect()
    }

    /// Compares the device with the CPU.
    ///
    /// # Errors
    /// Nothing could be compared: an engine was not made, or a step failed.
    pub fn run(&self, device: Box<dyn Device>, pool: &ComputePool) -> Result<Parity, ParityError> {
        let spec = self.spec()?;
        let config = EngineConfig {
            n_blocks: MAX_ROWS * CONTEXT / 16,
            block_tokens: 16,
            max_step_tokens: 512,
            max_rows: MAX_ROWS,
            context_tokens: CONTEXT,
        };
        let weights = Weights::from_bytes(random_weights(&spec, self.element, self.seed)?)?;
        let model = Arc::new(Model::load(spec.clone(), &weights, Precision::F16)?);
        let mut cpu = CpuEngine::new(model, pool.clone(), config)?;
        let options = CudaOptions { element: self.element, graphs: true };
        let source = (spec.clone(), Source::Files(&weights));
        let mut cuda = CudaEngine::load(device, source, config, options, &mut |_| {})?;
        let mut parity = Parity {
            steps: 0,
            tokens: 0,
            other_tokens: 0,
            worst: 0.0,
            bound: if self.element == Element::F32 { 1e-4 } else { 2e-2 },
            may_differ: if self.element == Element::F32 { 0 } else { usize::MAX },
        };
        let mut sequences: Vec<Vec<u32>> = (0..MAX_ROWS).map(|i| prompt(spec.vocab, i)).collect();
        let most = self.rows.iter().copied().max().unwrap_or(1).min(MAX_ROWS);
        let mut computed = vec![0; MAX_ROWS];
        // Prompts in steps of a few rows, then decodes.
        let prefills = (0..most).step_by(16).map(|first| first..most.min(first + 16));
        let decodes = self.rows.iter().map(|&rows| 0..rows.min(MAX_ROWS));
        for rows in prefills.chain(decodes) {
            let plan = plan(rows.clone(), &sequences, &computed);
            let chosen = compare(&mut cpu, &mut cuda, &plan, &mut parity)?;
            for (i, token) in rows.zip(chosen) {
                computed[i] = sequences[i].len();
                sequences[i].push(token);
            }
        }
        Ok(parity)
    }

    /// The model.
    ///
    /// # Errors
    /// The text is no `config.json`.
    pub fn spec(&self) -> Result<ModelSpec, SpecError> {
        ModelSpec::from_config(self.config.as_bytes())
    }
}

fn prompt(vocab: usize, row: usize) -> Vec<u32> {
    (0..1 + row * 7 % 41).map(|i| ((row * 131 + i * 37 + 5) % vocab) as u32).collect()
}

impl Parity {
    /// Whether it is within its bounds.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.worst <= self.bound && self.other_tokens <= self.may_differ
    }
}

/// One step on both; the CPU's tokens.
fn compare(
    cpu: &mut CpuEngine,
    cuda: &mut CudaEngine,
    plan: &StepPlan,
    parity: &mut Parity,
) -> Result<Vec<u32>, ParityError> {
    let (mut expect, mut found) = (StepOutput::default(), StepOutput::default());
    cpu.execute(plan, &mut NoEdits, &mut expect)?;
    cuda.execute(plan, &mut NoEdits, &mut found)?;
    parity.steps += 1;
    for (i, (expect, found)) in expect.sampled.iter().zip(&found.sampled).enumerate() {
        parity.tokens += 1;
        parity.other_tokens += usize::from(expect.token != found.token);
        let (a, b) = (cpu.logits(i), cuda.logits(i)?);
        let largest = a.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        // A logit that is no number is as far away as can be.
        let apart =
            |(a, b): (&f32, &f32)| if b.is_finite() { f64::from((a - b).abs() / largest) } else { f64::INFINITY };
        parity.worst = a.iter().zip(&b).map(apart).fold(parity.worst, f64::max);
    }
    Ok(expect.sampled.iter().map(|sampled| sampled.token).collect())
}

/// The tokens of these sequences that are not computed yet; pages of neighbours alternate.
fn plan(rows: Range<usize>, sequences: &[Vec<u32>], computed: &[usize]) -> StepPlan {
    let mut plan = StepPlan::default();
    for i in rows {
        let (tokens, blocks) = (plan.tokens.len() as u32, plan.blocks.len() as u32);
        plan.tokens.extend(&sequences[i][computed[i]..]);
        plan.blocks.extend((0..CONTEXT / 16).map(|page| BlockId((page * MAX_ROWS + i) as u32)));
        let drawn = Sampling { temperature: 0.8, seed: i as u64, top_p: 0.9, ..Sampling::default() };
        let sampling = if i % 2 == 0 { Sampling::default() } else { drawn };
        plan.rows.push(Row {
            request: RequestId(1 + i as u64),
            tokens: tokens..plan.tokens.len() as u32,
            position: computed[i] as u32,
            blocks: blocks..plan.blocks.len() as u32,
            sample: Some(Sample {
                sampling: Arc::new(sampling),
                index: sequences[i].len() as u32,
                history: 0..0,
                history_prompt: 0,
                banned: None,
            }),
        });
    }
    plan
}

/// Random weights of a model as a safetensors file.
fn random_weights(spec: &ModelSpec, element: Element, seed: u64) -> Result<Vec<u8>, SafeTensorError> {
    let (hidden, q_dim, kv_dim, ffn) = (spec.hidden, spec.q_dim(), spec.kv_dim(), spec.ffn);
    let of = |name: &str, shape: &[usize]| (format!("model.{name}"), shape.to_vec());
    let mut named = vec![of("embed_tokens.weight", &[spec.vocab, hidden]), of("norm.weight", &[hidden])];
    for layer in 0..spec.layers {
        let parts: [(&str, &[usize], bool); 14] = [
            ("input_layernorm.weight", &[hidden], true),
            ("self_attn.q_proj.weight", &[q_dim, hidden], true),
            ("self_attn.k_proj.weight", &[kv_dim, hidden], true),
            ("self_attn.v_proj.weight", &[kv_dim, hidden], true),
            ("self_attn.q_proj.bias", &[q_dim], spec.qkv_bias),
            ("self_attn.k_proj.bias", &[kv_dim], spec.qkv_bias),
            ("self_attn.v_proj.bias", &[kv_dim], spec.qkv_bias),
            ("self_attn.q_norm.weight", &[spec.head_dim], spec.qk_norm),
            ("self_attn.k_norm.weight", &[spec.head_dim], spec.qk_norm),
            ("self_attn.o_proj.weight", &[hidden, q_dim], true),
            ("post_attention_layernorm.weight", &[hidden], true),
            ("mlp.gate_proj.weight", &[ffn, hidden], true),
            ("mlp.up_proj.weight", &[ffn, hidden], true),
            ("mlp.down_proj.weight", &[hidden, ffn], true),
        ];
        let here = parts.iter().filter(|(.., present)| *present);
        named.extend(here.map(|(part, shape, _)| of(&format!("layers.{layer}.{part}"), shape)));
    }
    if !spec.tied {
        named.push(("lm_head.weight".to_owned(), vec![spec.vocab, hidden]));
    }
    let (dtype, mut random) = (dtype(element), seed);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = named
        .into_iter()
        .map(|(name, shape)| {
            let n = shape.iter().product();
            let (offset, scale) = if shape.len() == 1 { (1.0, 0.2) } else { (0.0, 1.7 / (shape[1] as f32).sqrt()) };
            let mut bytes = Vec::with_capacity(n * element.bytes());
            for _ in 0..n {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let uniform = (random >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
                write(element, offset + uniform * scale, &mut bytes);
            }
            (name, shape, bytes)
        })
        .collect();
    let views: Result<Vec<(&str, TensorView<'_>)>, SafeTensorError> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(dtype, shape.clone(), bytes)?)))
        .collect();
    safetensors::serialize(views?, None)
}

fn dtype(element: Element) -> Dtype {
    match element {
        Element::F32 => Dtype::F32,
        Element::F16 => Dtype::F16,
        Element::Bf16 => Dtype::BF16,
    }
}

fn write(element: Element, x: f32, to: &mut Vec<u8>) {
    match element {
        Element::F32 => to.extend(x.to_le_bytes()),
        Element::F16 => to.extend(f16::from_f32(x).to_le_bytes()),
        Element::Bf16 => to.extend(bf16::from_f32(x).to_le_bytes()),
    }
}
