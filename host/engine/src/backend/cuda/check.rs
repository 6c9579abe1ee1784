//! Whether a device computes what the CPU computes, on small random models of every shape that the kernels know.
//!
//! What `pointsman gpu-check` runs on a GPU, and the tests run on the kernels' shim. Each case prefills rows of uneven lengths in
//! chunks and decodes them in steps of many sizes, so that each kernel, split and bucket is met; rows take turns at every rule of
//! sampling. In `f32` the tokens must be the CPU's, but for near ties; in 16 bits the logits must be close.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use pointsman_sched::execute::{ExecuteError, Executor, InHalves, Row, Sample, Sampled, Score, StepOutput, StepPlan};
use pointsman_sched::ids::{BlockId, RequestId};
use pointsman_sched::request::{Sampling, TokenLogprobs};
use pointsman_sched::sampler::{Edit, EditSource};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError};

use super::device::{Device, DeviceError};
use super::element::{Element, Form};
use super::engine::{CudaEngine, CudaError, CudaOptions};
use super::tune::{GemmChoice, LibraryUse};
use super::weights::Source;
use crate::backend::cpu::{ComputePool, CpuEngine, Model, Precision};
use crate::backend::{ConfigError, EngineConfig};
use crate::load::{LoadError, Weights};
use crate::spec::{Experts, ModelSpec, Naming, SpecError};

/// A model and the steps to compare on.
#[derive(Clone, Debug)]
pub struct ParityCase {
    /// The model's `config.json`.
    pub config: String,
    /// The type to compute in, and how matrices are kept.
    pub form: Form,
    /// Tokens of each sequence's prompt; with what is generated they stay within the model's context.
    pub prompts: Vec<usize>,
    /// Rows of the decode steps, one after the other.
    pub rows: Vec<usize>,
    /// Tokens of a step, at most.
    pub step_tokens: usize,
    /// Replay captured graphs.
    pub graphs: bool,
    /// Products of many rows by the device's library.
    pub library: LibraryUse,
    /// Decode twice as often, each second step begun before the one before it is finished.
    pub ahead: bool,
    /// Keep memory for the pages of a step's sequences alone: others are computed anew when their turn comes.
    pub resized: bool,
    /// Say of each token of the prompts how likely it was.
    pub scored: bool,
    /// End decodes with up to three drafts, right or wrong.
    pub drafts: bool,
    /// Of the random weights.
    pub seed: u64,
}

/// What a comparison came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Parity {
    /// Steps compared.
    pub steps: usize,
    /// Tokens chosen.
    pub tokens: usize,
    /// Of those, others than the CPU's.
    pub other_tokens: usize,
    /// The first few of them.
    pub flips: Vec<Flip>,
    /// Largest difference of a logit, relative to the largest logit of its row; of rows whose rules leave logits alone.
    pub worst: f64,
    /// What that may be at most.
    pub bound: f64,
    /// Largest difference of a log-probability that was asked for.
    pub worst_logprob: f64,
    /// What that may be at most.
    pub logprob_bound: f64,
    /// Tokens that may differ at most, in a thousand: one in `f32`, where sums in another order turn a near tie; any in 16 bits.
    pub may_differ: usize,
}

/// A token that is not the CPU's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flip {
    /// The step.
    pub step: usize,
    /// The sequence.
    pub row: usize,
    /// The CPU's token.
    pub expect: u32,
    /// The device's.
    pub found: u32,
    /// How far apart the CPU has their logits.
    pub gap: f32,
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
    /// Steps were to be captured as graphs, and are not.
    #[error("nothing is captured: {0}")]
    NoGraphs(String),
    /// The device's library was to compute products, and computes none.
    #[error("cuBLASLt computes nothing: {0}")]
    NoLibrary(String),
    /// The pool was to have another size, and keeps its own.
    #[error("the KV pool keeps its size: {0}")]
    NoPool(String),
    /// Logits could not be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Most tokens of a step; of one whose products are computed in parts; positions of a page.
const STEP_TOKENS: usize = 512;
const LONG_STEP_TOKENS: usize = 1_536;
const BLOCK_TOKENS: usize = 16;

/// Rows that are prefilled together.
const TOGETHER: usize = 16;

/// Most drafts of a row.
const MOST_DRAFTS: usize = 3;

/// Most tokens of which a report says that they differ.
const MAX_FLIPS: usize = 4;

/// Of the random models.
const VOCAB: usize = 1_003;

/// Architecture, size of a head, query heads, key heads, and what else its `config.json` has.
type Shape = (&'static str, usize, usize, usize, &'static str);

const SHAPES: [Shape; 8] = [
    ("LlamaForCausalLM", 32, 6, 2, ""),
    ("LlamaForCausalLM", 64, 8, 1, r#", "tie_word_embeddings": false"#),
    ("Qwen2ForCausalLM", 128, 4, 4, r#", "use_sliding_window": false"#),
    ("Qwen3ForCausalLM", 64, 12, 1, r#", "attention_bias": false"#),
    ("MistralForCausalLM", 64, 4, 2, r#", "sliding_window": 20"#),
    ("Phi3ForCausalLM", 96, 2, 2, r#", "sliding_window": 30, "partial_rotary_factor": 0.67"#),
    (
        "Gemma2ForCausalLM",
        256,
        4,
        2,
        r#", "sliding_window": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0"#,
    ),
    (
        "Gemma3ForCausalLM",
        128,
        6,
        1,
        r#", "sliding_window": 20, "sliding_window_pattern": 2, "query_pre_attn_scalar": 2048"#,
    ),
];

/// Shapes with experts, and the type and precision that each is compared in. In 16 bits all experts are chosen: which of two comes first
/// may hang on a rounding, and what follows is another sum.
const EXPERT_SHAPES: [(Shape, Element, Precision); 6] = [
    (MIXTRAL, Element::F32, Precision::F16),
    (QWEN3_MOE, Element::F32, Precision::F16),
    (MIXTRAL, Element::F32, Precision::Q8_0),
    (ALL_CHOSEN, Element::Bf16, Precision::F16),
    (ALL_CHOSEN, Element::F16, Precision::Q8_0),
    (ALL_CHOSEN, Element::Bf16, Precision::Fp8),
];
const MIXTRAL: Shape = ("MixtralForCausalLM", 64, 4, 2, r#", "num_local_experts": 5, "num_experts_per_tok": 2"#);
const QWEN3_MOE: Shape = (
    "Qwen3MoeForCausalLM",
    32,
    6,
    2,
    r#", "num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "mlp_only_layers": [1]"#,
);
const ALL_CHOSEN: Shape = ("MixtralForCausalLM", 64, 4, 2, r#", "num_local_experts": 3, "num_experts_per_tok": 3"#);

fn config((architecture, head_dim, heads, kv_heads, more): Shape, context: usize) -> String {
    format!(
        r#"{{"architectures": ["{architecture}"], "vocab_size": {VOCAB}, "hidden_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": {head_dim},
        "intermediate_size": 160, "max_position_embeddings": {context}, "rms_norm_eps": 1e-5{more}}}"#
    )
}

// === impl ParityCase ===

impl ParityCase {
    fn short(shape: Shape, form: impl Into<Form>, graphs: bool) -> Self {
        Self {
            config: config(shape, 80),
            form: form.into(),
            prompts: (0..96).map(|i| 1 + i * 7 % 41).collect(),
            rows: vec![1, 2, 3, 7, 9, 17, 33, 64, 70, 96],
            step_tokens: STEP_TOKENS,
            graphs,
            library: LibraryUse::Faster,
            ahead: false,
            resized: false,
            scored: false,
            drafts: false,
            seed: 7,
        }
    }

    /// Every head size and group that the kernels tell apart, in every type; the types of the first one come first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let of = |shape: Shape| Element::ALL.map(|element| Self::short(shape, element, true));
        SHAPES.into_iter().flat_map(of).collect()
    }

    /// Models with sparse experts: steps in which each has a few rows, and many.
    #[must_use]
    pub fn experts() -> Vec<Self> {
        let of = |(shape, element, precision)| Self::short(shape, Form { element, precision }, true);
        EXPERT_SHAPES.map(of).into()
    }

    /// The same steps launched kernel by kernel.
    #[must_use]
    pub fn eager() -> Vec<Self> {
        vec![Self::short(SHAPES[1], Element::F32, false), Self::short(SHAPES[2], Element::Bf16, false)]
    }

    /// Steps that are begun behind one that is under way, and take its tokens on the device.
    #[must_use]
    pub fn ahead() -> Vec<Self> {
        let eager = Self::eager().into_iter();
        let cases = [Self::short(SHAPES[0], Element::F32, true), Self::short(SHAPES[1], Element::Bf16, true)];
        cases.into_iter().chain(eager).map(|case| Self { ahead: true, ..case }).collect()
    }

    /// Prompts that come in several chunks, while rows before and behind them decode.
    #[must_use]
    pub fn beside() -> Vec<Self> {
        let of = |(shape, element)| Self {
            prompts: vec![40, 3, 33, 9],
            rows: vec![4],
            step_tokens: 48,
            ..Self::short(shape, element, true)
        };
        use Element::{Bf16, F16, F32};
        [(SHAPES[0], F32), (SHAPES[1], Bf16), (SHAPES[4], F16), (SHAPES[6], Bf16)].map(of).into()
    }

    /// Prompts that are scored in several chunks, each in several pieces, beside decodes.
    #[must_use]
    pub fn scored() -> Vec<Self> {
        let cases = Self::beside().into_iter();
        cases.map(|case| Self { prompts: vec![40, 3, 1, 9], rows: vec![2], scored: true, ..case }).collect()
    }

    /// Tokens that are chosen after drafts: in steps of decodes, and beside chunks of prompts.
    #[must_use]
    pub fn drafted() -> Vec<Self> {
        use Element::{Bf16, F32};
        let decodes = [(SHAPES[0], F32), (SHAPES[1], Bf16)].map(|(shape, element)| Self::short(shape, element, true));
        let cases = decodes.into_iter().chain(Self::beside());
        cases.map(|case| Self { drafts: true, ..case }).collect()
    }

    /// A context of more than 8,000 tokens beside a short one, so that decodes are cut into many splits; where a window leaves less of
    /// it, into a few.
    #[must_use]
    pub fn long() -> Vec<Self> {
        let of = |(shape, element)| Self {
            config: config(shape, 8_448),
            prompts: vec![8_250, 3],
            rows: vec![1, 2, 2, 1, 2],
            ..Self::short(shape, element, true)
        };
        let (all, windowed) =
            (("LlamaForCausalLM", 128, 4, 1, ""), ("MistralForCausalLM", 64, 4, 2, r#", "sliding_window": 150"#));
        [(all, Element::F32), (all, Element::Bf16), (windowed, Element::F16)].map(of).into()
    }

    /// A pool that gives back what a short context does not need, and takes it again for a long one: several pieces of what drivers map
    /// at once.
    #[must_use]
    pub fn resized() -> Vec<Self> {
        let cases = Self::long().into_iter().take(2);
        cases.map(|case| Self { prompts: vec![3, 8_250], rows: vec![2, 1, 2, 1, 2], resized: true, ..case }).collect()
    }

    /// Matrices in 8 bits, of numbers that those hold exactly: one that is tied and one that is not.
    #[must_use]
    pub fn in_8_bits() -> Vec<Self> {
        use Element::{Bf16, F16, F32};
        use Precision::{Fp8, Q8_0};
        let of = |(shape, element, precision)| Self::short(shape, Form { element, precision }, true);
        [(SHAPES[0], F32, Q8_0), (SHAPES[1], F32, Fp8), (SHAPES[1], Bf16, Q8_0), (SHAPES[0], F16, Fp8)].map(of).into()
    }

    /// Steps with prompts whose products the device's library computes, some in parts.
    #[must_use]
    pub fn by_library() -> Vec<Self> {
        let of = |(shape, element)| Self {
            prompts: vec![66; TOGETHER],
            step_tokens: LONG_STEP_TOKENS,
            library: LibraryUse::Always,
            ..Self::short(shape, element, true)
        };
        use Element::{Bf16, F16, F32};
        [(SHAPES[0], F32), (SHAPES[0], F16), (SHAPES[1], Bf16), (SHAPES[2], Bf16), (SHAPES[7], F16)].map(of).into()
    }

    /// Short ones of each kind: for a memory checker, under which each launch takes a while.
    #[must_use]
    pub fn small() -> Vec<Self> {
        let kinds = [Self::all(), Self::in_8_bits(), Self::experts(), Self::ahead(), Self::drafted(), Self::scored()];
        let cases = kinds.into_iter().flatten();
        // All rules, and no more.
        let n = rules().len();
        let short = |case: Self| {
            let prompts = case.prompts.iter().copied().take(n).collect();
            Self { prompts, rows: vec![1, 3, n], ..case }
        };
        cases.map(short).collect()
    }

    /// Compares the device with the CPU.
    ///
    /// # Errors
    /// Nothing could be compared: an engine was not made, or a step failed.
    pub fn run(&self, device: Box<dyn Device>, pool: &ComputePool) -> Result<Parity, ParityError> {
        let spec = self.spec()?;
        let n_rows = self.prompts.len();
        let config = EngineConfig {
            n_blocks: n_rows * spec.context.div_ceil(BLOCK_TOKENS),
            block_tokens: BLOCK_TOKENS,
            max_step_tokens: self.step_tokens,
            max_rows: n_rows + if self.drafts { MOST_DRAFTS * TOGETHER } else { 0 },
            context_tokens: spec.context,
        };
        let weights = Weights::from_bytes(random_weights(&spec, self.form, self.seed)?)?;
        let model = Arc::new(Model::load(spec.clone(), &weights, Precision::F16)?);
        let options = CudaOptions { form: self.form, graphs: self.graphs, library: self.library };
        let source = (spec.clone(), Source::Files(&weights));
        let mut pair = Pair {
            cpu: CpuEngine::new(model, pool.clone(), config)?,
            cuda: CudaEngine::load(device, source, config, options, &mut |_| true)?,
            rules: rules(),
            scored: self.scored,
            drafts: self.drafts,
            parity: Parity::of(self.form.element),
        };
        if self.graphs && pair.cuda.device().captures() && !pair.cuda.has_graphs() {
            return Err(ParityError::NoGraphs(pair.cuda.take_note().unwrap_or_default()));
        }
        self.check_library(&mut pair.cuda)?;
        let mut sequences: Vec<Sequence> =
            self.prompts.iter().enumerate().map(|(i, &len)| Sequence::new(i, len, spec.context)).collect();
        let most = self.rows.iter().copied().max().unwrap_or(1).min(n_rows);
        for first in (0..most).step_by(TOGETHER) {
            pair.prefill(self.ahead, first..most.min(first + TOGETHER), &mut sequences)?;
        }
        for rows in self.rows.iter().map(|&rows| 0..rows.min(most)) {
            if self.resized {
                pair.keep_pages_of(rows.clone(), &mut sequences)?;
                pair.prefill(self.ahead, rows.clone(), &mut sequences)?;
            }
            pair.steps(self.ahead, rows, &mut sequences)?;
        }
        self.check_library(&mut pair.cuda)?;
        Ok(pair.parity)
    }

    /// Whether the library computes all that it was to compute: before the steps, and still after them.
    fn check_library(&self, cuda: &mut CudaEngine) -> Result<(), ParityError> {
        let choices = cuda.gemm_choices();
        let is_asked = self.library == LibraryUse::Always;
        if is_asked && (choices.is_empty() || !choices.iter().all(GemmChoice::is_library)) {
            return Err(ParityError::NoLibrary(cuda.take_note().unwrap_or_default()));
        }
        Ok(())
    }

    /// The model.
    ///
    /// # Errors
    /// The text is no `config.json`.
    pub fn spec(&self) -> Result<ModelSpec, SpecError> {
        ModelSpec::from_config(self.config.as_bytes())
    }
}

// === Sequences and their rules ===

/// One of the sequences that are computed on both.
#[derive(Clone, Debug)]
struct Sequence {
    tokens: Vec<u32>,
    prompt: usize,
    computed: usize,
    pages: usize,
}

/// How a sequence's tokens are chosen.
#[derive(Clone, Debug, Default)]
struct Rules {
    sampling: Arc<Sampling>,
    banned: Option<Arc<[u32]>>,
    edit: Option<Arc<Edit>>,
}

impl Sequence {
    fn new(row: usize, prompt: usize, context: usize) -> Self {
        let tokens = (0..prompt).map(|i| ((row * 131 + i * 37 + i * i % 11 + 5) % VOCAB) as u32).collect();
        Self { tokens, prompt, computed: 0, pages: context.div_ceil(BLOCK_TOKENS) }
    }

    fn is_prefilling(&self) -> bool {
        self.computed < self.prompt
    }
}

impl Rules {
    /// Whether logits are what the forward pass made.
    fn leave_logits(&self) -> bool {
        let is_plain = self.sampling.logit_bias.is_empty() && !self.sampling.needs_history();
        is_plain && self.banned.is_none() && self.edit.is_none()
    }
}

/// One of each kind; sequences take turns at them.
fn rules() -> Vec<Rules> {
    let of = |sampling: Sampling| Rules { sampling: Arc::new(sampling), ..Rules::default() };
    let greedy = Sampling::default;
    let drawn = |temperature: f32| Sampling { temperature, ..greedy() };
    let allowed: Box<[u32]> = (0..VOCAB as u32).step_by(7).collect();
    let forbidden: Box<[u32]> = (0..500).collect();
    let biases: Box<[(u32, f32)]> = (0..40).map(|i| (i * 25, 0.5 - i as f32 * 0.02)).collect();
    let edited = |sampling, edit| Rules { edit: Some(Arc::new(edit)), ..of(sampling) };
    vec![
        of(greedy()),
        of(Sampling { top_p: 0.9, ..drawn(0.8) }),
        of(Sampling { logprobs: Some(5), ..greedy() }),
        of(Sampling { top_k: 7, ..drawn(0.9) }),
        Rules { banned: Some((0..300).collect()), ..of(greedy()) },
        of(Sampling { min_p: 0.05, logprobs: Some(20), ..drawn(1.1) }),
        of(Sampling { repetition_penalty: 1.3, ..greedy() }),
        of(Sampling { presence_penalty: 0.6, frequency_penalty: 0.3, ..drawn(0.7) }),
        of(Sampling { logit_bias: vec![(3, 5.0), (4, -2.0), (1_002, 1.0)], logprobs: Some(0), ..greedy() }),
        // Each token makes the other one the next.
        of(Sampling {
            presence_penalty: 2.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(3, 100.0), (4, 100.0)],
            ..greedy()
        }),
        edited(drawn(0.9), Edit::Allow(allowed)),
        edited(greedy(), Edit::Forbid(forbidden)),
        edited(Sampling { top_k: 40, top_p: 0.8, ..drawn(1.0) }, Edit::Bias(biases)),
    ]
}

/// The edits of requests by their numbers, which are those of rows, from 1.
struct Edits<'a>(&'a [Rules]);

impl EditSource for Edits<'_> {
    fn edit(&mut self, request: RequestId) -> Option<Arc<Edit>> {
        self.0[(request.0 as usize - 1) % self.0.len()].edit.clone()
    }
}

// === Both engines ===

/// Where a token's logits are, and of which sequence it is. The CPU has those after drafts behind all others, a device behind the draft's
/// row.
#[derive(Clone, Copy, Debug)]
struct Place {
    on_cpu: usize,
    on_device: usize,
    index: usize,
}

/// The same model on the CPU and on the device.
struct Pair {
    cpu: CpuEngine,
    cuda: CudaEngine,
    rules: Vec<Rules>,
    scored: bool,
    drafts: bool,
    parity: Parity,
}

impl Pair {
    /// The prompts of these sequences. Those whose prompt ends earlier decode beside the others' chunks.
    fn prefill(&mut self, ahead: bool, rows: Range<usize>, sequences: &mut [Sequence]) -> Result<(), ParityError> {
        while sequences[rows.clone()].iter().any(Sequence::is_prefilling) {
            self.steps(ahead, rows.clone(), sequences)?;
        }
        Ok(())
    }

    /// Gives the device's pool the pages that these sequences need for two steps more. What others have there is gone.
    fn keep_pages_of(&mut self, rows: Range<usize>, sequences: &mut [Sequence]) -> Result<(), ParityError> {
        let longest = sequences[rows.clone()].iter().map(|sequence| sequence.tokens.len() + 2).max().unwrap_or(0);
        let n_blocks = longest.div_ceil(BLOCK_TOKENS) * sequences.len();
        let sized = self.cuda.resize_pool(u32::try_from(n_blocks).unwrap_or(u32::MAX))?;
        if sized.is_none_or(|sized| (sized.n_blocks as usize) < n_blocks) {
            let notes = self.cuda.device().notes().join("; ");
            return Err(ParityError::NoPool(format!("{sized:?} for {n_blocks} blocks; {notes}")));
        }
        sequences[rows.end..].iter_mut().for_each(|sequence| sequence.computed = 0);
        Ok(())
    }

    /// One step of these sequences, or two where the first gives each of them a token and that is asked for.
    fn steps(&mut self, ahead: bool, rows: Range<usize>, sequences: &mut [Sequence]) -> Result<(), ParityError> {
        let first = self.plan(rows.clone(), sequences);
        match ahead && first.rows.iter().all(|row| row.sample.is_some()) {
            true => self.two_steps(rows, sequences),
            false => self.step(rows, sequences),
        }
    }

    /// One step of these sequences on both; they go on with the CPU's tokens.
    fn step(&mut self, rows: Range<usize>, sequences: &mut [Sequence]) -> Result<(), ParityError> {
        let plan = self.plan(rows, sequences);
        let (mut expect, mut found) = (StepOutput::default(), StepOutput::default());
        self.cpu.execute(&plan, &mut Edits(&self.rules), &mut expect)?;
        self.cuda.execute(&plan, &mut Edits(&self.rules), &mut found)?;
        for (expect, found) in expect.scores.iter().zip(&found.scores) {
            self.parity.compare_logprobs(expect, found);
        }
        if found.scores.len() != plan.scored.len() {
            return Err(ExecuteError::Malformed { what: "a token has no score" }.into());
        }
        // Scores take the places of the logits.
        let has_logits = plan.scores.is_empty();
        self.settle(&plan, (&expect, &found), has_logits.then_some(&[]), sequences)
    }

    /// Two steps, of which the device is given the second one before it has finished the first. It goes on with its own tokens: where
    /// such a one is not the CPU's, the second step counts for nothing. The first of several rows is not in the second step.
    fn two_steps(&mut self, rows: Range<usize>, sequences: &mut [Sequence]) -> Result<(), ParityError> {
        let (mut expect, mut found) = (StepOutput::default(), StepOutput::default());
        let first = self.plan(rows.clone(), sequences);
        let left_out = usize::from(rows.len() > 1);
        let going_on = rows.start + left_out..rows.end;
        let behind = self.plan_behind(&first, left_out, going_on.clone(), sequences);
        self.cuda.begin(&first, &mut Edits(&self.rules))?;
        self.cuda.begin(&behind, &mut Edits(&self.rules))?;
        self.cpu.execute(&first, &mut Edits(&self.rules), &mut expect)?;
        self.cuda.finish(&first, &mut found)?;
        let pairs = expect.sampled.iter().zip(&found.sampled).skip(left_out);
        let others: Vec<bool> = pairs.map(|(a, b)| a.token != b.token).collect();
        self.settle(&first, (&expect, &found), None, sequences)?;
        let second = self.plan(going_on, sequences);
        self.cpu.execute(&second, &mut Edits(&self.rules), &mut expect)?;
        self.cuda.finish(&behind, &mut found)?;
        self.settle(&second, (&expect, &found), Some(&others), sequences)
    }

    /// The step of these sequences after one in which each gets a token, with that left open. In the first one so many rows come before
    /// theirs.
    fn plan_behind(&self, first: &StepPlan, n_before: usize, rows: Range<usize>, sequences: &[Sequence]) -> StepPlan {
        let mut later = sequences.to_vec();
        for (sequence, row) in later[rows.clone()].iter_mut().zip(&first.rows[n_before..]) {
            sequence.computed += row.tokens.len();
            sequence.tokens.push(0);
        }
        let mut plan = self.plan(rows, &later);
        let samples = plan.rows.iter_mut().filter_map(|row| row.sample.as_mut());
        samples.filter(|sample| !sample.history.is_empty()).for_each(|sample| sample.history.end -= 1);
        plan.follows = (n_before as u32..).take(plan.rows.len()).collect();
        plan
    }

    /// Compares what a step came to and goes on from it, but for the rows that are of no account. Logits are compared where those of
    /// the step are still there, which is where such rows are named.
    fn settle(
        &mut self,
        plan: &StepPlan,
        (expect, found): (&StepOutput, &StepOutput),
        of_no_account: Option<&[bool]>,
        sequences: &mut [Sequence],
    ) -> Result<(), ParityError> {
        self.parity.steps += 1;
        let (n_sampled, mut n_after) = (expect.sampled.len(), 0);
        let mut sampled = expect.sampled.iter().zip(&found.sampled).enumerate();
        let mut after_drafts = expect.after_drafts.iter().zip(&found.after_drafts);
        for (at, row) in plan.rows.iter().enumerate() {
            let index = row.request.0 as usize - 1;
            let sequence = &mut sequences[index];
            let chosen = if row.sample.is_some() { sampled.next() } else { None };
            if of_no_account.is_some_and(|rows| rows.get(at) == Some(&true)) {
                continue;
            }
            sequence.computed += row.tokens.len() - row.drafts as usize;
            let nothing = ExecuteError::Malformed { what: "a row has no token" };
            match chosen {
                Some((i, pair)) => {
                    sequence.tokens.push(pair.0.token);
                    let has_logits = of_no_account.is_some();
                    self.compare(Place { on_cpu: i, on_device: i + n_after, index }, pair, has_logits)?;
                    for _ in 0..row.drafts {
                        let pair = after_drafts.next().ok_or(nothing.clone())?;
                        let (on_cpu, on_device) = (n_sampled + n_after, i + 1 + n_after);
                        self.compare(Place { on_cpu, on_device, index }, pair, has_logits)?;
                        n_after += 1;
                    }
                }
                None if row.sample.is_some() => return Err(nothing.into()),
                None => {}
            }
        }
        Ok(())
    }

    /// The tokens of these sequences that are not computed yet, as many as fit; pages of neighbours alternate.
    fn plan(&self, rows: Range<usize>, sequences: &[Sequence]) -> StepPlan {
        let mut plan = StepPlan::default();
        let share = self.cuda.config().max_step_tokens / rows.len().max(1);
        let mut spare = self.cuda.config().max_rows - rows.len();
        for i in rows {
            let Sequence { tokens, prompt, computed, pages } = &sequences[i];
            let n = (tokens.len() - computed).min(share);
            let drafts = self.drafts_of(i, &sequences[i], spare.min(share - n));
            spare -= drafts.len();
            let start = plan.tokens.len() as u32..(plan.tokens.len() + n + drafts.len()) as u32;
            plan.tokens.extend(&tokens[*computed..computed + n]);
            plan.tokens.extend(&drafts);
            let first = plan.blocks.len() as u32;
            // Those that are written so far: tables of neighbours differ in length.
            let n_pages = (computed + n + drafts.len()).div_ceil(BLOCK_TOKENS).min(*pages);
            plan.blocks.extend((0..n_pages).map(|page| BlockId((page * sequences.len() + i) as u32)));
            let n_scored = if self.scored { n.min((prompt - 1).saturating_sub(*computed)) as u32 } else { 0 };
            if n_scored > 0 {
                let next = plan.scored.len() as u32;
                plan.scored.extend(&tokens[computed + 1..][..n_scored as usize]);
                let (after, next) = (start.start..start.start + n_scored, next..next + n_scored);
                plan.scores.push(Score { after, next, top: [5, 0, 20][i % 3] });
            }
            let Rules { sampling, banned, .. } = &self.rules[i % self.rules.len()];
            let history = plan.history.len() as u32;
            let history = history..history + if sampling.needs_history() { tokens.len() as u32 } else { 0 };
            if sampling.needs_history() {
                plan.history.extend(tokens.iter().chain(&drafts));
            }
            let sample = Sample {
                sampling: Arc::new(Sampling { seed: i as u64, ..Sampling::clone(sampling) }),
                index: (tokens.len() - prompt) as u32,
                history,
                history_prompt: if sampling.needs_history() { *prompt as u32 } else { 0 },
                banned: banned.clone(),
            };
            plan.rows.push(Row {
                request: RequestId(1 + i as u64),
                tokens: start,
                position: *computed as u32,
                blocks: first..plan.blocks.len() as u32,
                sample: (computed + n == tokens.len()).then_some(sample),
                drafts: drafts.len() as u32,
            });
        }
        plan
    }

    /// Up to so many drafts for a sequence, where its next token is chosen and no edit has a word in it.
    fn drafts_of(&self, i: usize, sequence: &Sequence, most: usize) -> Vec<u32> {
        let Sequence { tokens, computed, pages, .. } = sequence;
        let is_edited = self.rules[i % self.rules.len()].edit.is_some();
        let may = self.drafts && !is_edited && computed + 1 == tokens.len();
        let n = if may { i % (MOST_DRAFTS + 1) } else { 0 };
        let n = n.min(most).min(pages * BLOCK_TOKENS - tokens.len());
        (0..n).map(|ahead| ((i * 71 + tokens.len() * 13 + ahead * 29) % VOCAB) as u32).collect()
    }

    /// A token of a step.
    fn compare(
        &mut self,
        Place { on_cpu, on_device, index }: Place,
        (expect, found): (&Sampled, &Sampled),
        has_logits: bool,
    ) -> Result<(), ParityError> {
        let Self { cpu, cuda, rules, parity, .. } = self;
        let logits = cpu.logits(on_cpu);
        parity.tokens += 1;
        if expect.token != found.token {
            parity.other_tokens += 1;
            let gap = (logits[expect.token as usize] - logits[found.token as usize]).abs();
            let flip = Flip { step: parity.steps, row: index, expect: expect.token, found: found.token, gap };
            parity.flips.extend((parity.flips.len() < MAX_FLIPS).then_some(flip));
        } else if let (Some(expect), Some(found)) = (&expect.logprobs, &found.logprobs) {
            parity.compare_logprobs(expect, found);
        }
        if has_logits && rules[index % rules.len()].leave_logits() {
            let largest = logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let found = cuda.logits(on_device)?;
            parity.worst = logits.iter().zip(&found).map(|(&a, &b)| apart(a, b, largest)).fold(parity.worst, f64::max);
        }
        Ok(())
    }
}

/// How far `b` is from `a`, in units of `unit`. What is no number is as far away as can be.
fn apart(a: f32, b: f32, unit: f32) -> f64 {
    if b.is_finite() { f64::from((a - b).abs() / unit) } else { f64::INFINITY }
}

// === impl Parity ===

impl Parity {
    fn of(element: Element) -> Self {
        let is_exact = element == Element::F32;
        Self {
            steps: 0,
            tokens: 0,
            other_tokens: 0,
            flips: Vec::new(),
            worst: 0.0,
            bound: if is_exact { 1e-4 } else { 2e-2 },
            worst_logprob: 0.0,
            logprob_bound: if is_exact { 1e-3 } else { 0.5 },
            may_differ: if is_exact { 1 } else { 1_000 },
        }
    }

    fn compare_logprobs(&mut self, a: &TokenLogprobs, b: &TokenLogprobs) {
        let chosen = std::iter::once((a.chosen, b.chosen));
        let pairs = chosen.chain(a.top.iter().zip(&b.top).map(|(a, b)| (a.1, b.1)));
        let worst = pairs.map(|(a, b)| apart(a, b, 1.0)).fold(self.worst_logprob, f64::max);
        self.worst_logprob = if a.top.len() == b.top.len() { worst } else { f64::INFINITY };
    }

    /// Whether it is within its bounds.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let few_differ = self.other_tokens <= (self.tokens * self.may_differ).div_ceil(1_000);
        self.worst <= self.bound && self.worst_logprob <= self.logprob_bound && few_differ
    }
}

impl fmt::Display for Parity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { steps, tokens, other_tokens, worst, bound, worst_logprob, logprob_bound, .. } = self;
        write!(
            f,
            "{steps} steps, logits within {worst:.1e} (bound {bound:.0e}), log-probabilities within {worst_logprob:.1e} \
             (bound {logprob_bound}), {other_tokens} of {tokens} tokens differ"
        )?;
        // In 16 bits that says nothing.
        for Flip { step, row, expect, found, gap } in self.flips.iter().filter(|_| self.may_differ == 1) {
            write!(f, "; step {step} row {row}: {found} for {expect}, whose logits are {gap:.1e} apart")?;
        }
        Ok(())
    }
}

/// Random weights of a model as a safetensors file; in `f32`, on the grid of its precision, where matrices have 8 bits.
fn random_weights(spec: &ModelSpec, form: Form, seed: u64) -> Result<Vec<u8>, SafeTensorError> {
    let (hidden, q_dim, kv_dim) = (spec.hidden, spec.q_dim(), spec.kv_dim());
    let of = |name: &str, shape: &[usize]| (format!("model.{name}"), shape.to_vec());
    let mut named = vec![of("embed_tokens.weight", &[spec.vocab, hidden]), of("norm.weight", &[hidden])];
    for layer in 0..spec.layers {
        let is_packed = spec.naming == Naming::Packed;
        let dense = spec.experts.as_ref().map_or(Some(spec.ffn), |experts| experts.dense[layer]);
        let (is_dense, ffn) = (dense.is_some(), dense.unwrap_or(spec.ffn));
        let parts: [(&str, &[usize], bool); 18] = [
            ("input_layernorm.weight", &[hidden], true),
            ("self_attn.qkv_proj.weight", &[q_dim + 2 * kv_dim, hidden], is_packed),
            ("self_attn.q_proj.weight", &[q_dim, hidden], !is_packed),
            ("self_attn.k_proj.weight", &[kv_dim, hidden], !is_packed),
            ("self_attn.v_proj.weight", &[kv_dim, hidden], !is_packed),
            ("self_attn.q_proj.bias", &[q_dim], spec.qkv_bias),
            ("self_attn.k_proj.bias", &[kv_dim], spec.qkv_bias),
            ("self_attn.v_proj.bias", &[kv_dim], spec.qkv_bias),
            ("self_attn.q_norm.weight", &[spec.head_dim], spec.qk_norm),
            ("self_attn.k_norm.weight", &[spec.head_dim], spec.qk_norm),
            ("self_attn.o_proj.weight", &[hidden, q_dim], true),
            ("post_attention_layernorm.weight", &[hidden], true),
            ("pre_feedforward_layernorm.weight", &[hidden], spec.post_norms),
            ("post_feedforward_layernorm.weight", &[hidden], spec.post_norms),
            ("mlp.gate_up_proj.weight", &[2 * ffn, hidden], is_dense && is_packed),
            ("mlp.gate_proj.weight", &[ffn, hidden], is_dense && !is_packed),
            ("mlp.up_proj.weight", &[ffn, hidden], is_dense && !is_packed),
            ("mlp.down_proj.weight", &[hidden, ffn], is_dense),
        ];
        let here = parts.iter().filter(|(.., present)| *present);
        named.extend(here.map(|(part, shape, _)| of(&format!("layers.{layer}.{part}"), shape)));
        if let Some(experts) = spec.experts.as_ref().filter(|_| !is_dense) {
            named.extend(expert_shapes(spec, experts, &format!("model.layers.{layer}")));
        }
    }
    if !spec.tied {
        named.push(("lm_head.weight".to_owned(), vec![spec.vocab, hidden]));
    }
    let element = if form.precision == Precision::F16 { form.element } else { Element::F32 };
    let (dtype, mut random) = (dtype(element), seed);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = named
        .into_iter()
        .map(|(name, shape)| {
            let n = shape.iter().product();
            let (offset, scale) = if shape.len() == 1 { (1.0, 0.2) } else { (0.0, 1.7 / (shape[1] as f32).sqrt()) };
            let mut next = || {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                offset + ((random >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * scale
            };
            let mut values: Vec<f32> = (0..n).map(|_| next()).collect();
            if shape.len() == 2 {
                put_on_grid(form.precision, shape[1], &mut values);
            }
            let mut bytes = Vec::with_capacity(n * element.bytes());
            values.into_iter().for_each(|x| write(element, x, &mut bytes));
            (name, shape, bytes)
        })
        .collect();
    let views: Result<Vec<(&str, TensorView<'_>)>, SafeTensorError> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(dtype, shape.clone(), bytes)?)))
        .collect();
    safetensors::serialize(views?, None)
}

/// Names and shapes of a layer's router and experts.
fn expert_shapes(spec: &ModelSpec, experts: &Experts, layer: &str) -> Vec<(String, Vec<usize>)> {
    let (block, [gate, up, down]) = match spec.naming {
        Naming::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
        _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
    };
    let of = |i: usize| {
        let name = move |part| format!("{layer}.{block}.experts.{i}.{part}.weight");
        let (wide, narrow) = (vec![spec.ffn, spec.hidden], vec![spec.hidden, spec.ffn]);
        [(name(gate), wide.clone()), (name(up), wide), (name(down), narrow)]
    };
    let router = (format!("{layer}.{block}.gate.weight"), vec![experts.count, spec.hidden]);
    [router].into_iter().chain((0..experts.count).flat_map(of)).collect()
}

/// Rounds a matrix with rows of `k` to numbers that a precision of 8 bits holds, so that quantising it loses nothing and the CPU can be
/// asked for the same product.
pub fn put_on_grid(precision: Precision, k: usize, values: &mut [f32]) {
    let (width, largest) = match precision {
        Precision::F16 => return,
        Precision::Q8_0 => (32, 127.0),
        Precision::Fp8 => (k, 448.0),
    };
    for run in values.chunks_mut(width) {
        let scale = run.iter().fold(0.0f32, |max, x| max.max(x.abs())) / largest;
        let scale = if precision == Precision::Q8_0 { f16::from_f32(scale).to_f32() } else { scale };
        // Of an e4m3 number, the step is an eighth of its power of two, and of 2^-6 below that.
        let step = |x: f32| match precision {
            Precision::Q8_0 => 1.0,
            _ => x.abs().log2().floor().max(-6.0).exp2() / 8.0,
        };
        let rounded = |x: f32| ((x / step(x)).round_ties_even() * step(x)).clamp(-largest, largest);
        run.iter_mut().for_each(|x| *x = rounded(*x / scale) * scale);
    }
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
