//! The forward pass of a step, over all tokens of all rows at once.
//!
//! One product per projection and step, whatever mix of prefill chunks and decodes the plan holds; attention alone works
//! row by row. Everything a step needs is allocated when the engine is made, for the largest step that it promises.

use std::sync::Arc;

use pointsman_sched::execute::{ExecuteError, Executor, Score, StepOutput, StepPlan};
use pointsman_sched::request::TokenLogprobs;
use pointsman_sched::sampler::EditSource;

use super::aligned::Aligned;
use super::attention::{Attention, Token};
use super::experts::{ExpertWork, Sparse};
use super::gemm::{Epilogue, Input, matmul};
use super::isa::{LANES, Lanes, stride};
use super::kv::{KvPlan, KvPool, Position, Strided};
use super::matrix::{Matrix, PANEL};
use super::model::{Ffn, Layer, Model};
use super::norm::{Norm, Normed, RopeTables, norm_heads, rms_norm, rms_norm_add};
use super::pool::{ComputePool, Units};
use super::quant::Quantised;
use super::rows;
use crate::backend::config::{ConfigError, EngineConfig};
use crate::sampling::Sampler;
use crate::spec::Activation;

/// Memory by owner, in bytes. Weights are shared by all engines of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Packed weights.
    pub weights: usize,
    /// Pages of keys and values.
    pub kv: usize,
    /// Activations, tables and sampling scratch.
    pub workspace: usize,
}

/// Computes step plans on the CPU.
#[derive(Debug)]
pub struct CpuEngine {
    model: Arc<Model>,
    pool: ComputePool,
    config: EngineConfig,
    kv: KvPool,
    rope: RopeTables,
    /// For layers with a window, where theirs differs.
    window_rope: Option<RopeTables>,
    work: Workspace,
}

/// Activations, all panel-major: `[width / 16][stride(tokens of the step)][16]`.
#[derive(Debug)]
struct Workspace {
    hidden: Aligned<f32, LANES>,
    normed: Aligned<f32, LANES>,
    /// By row, of the norm that is being computed.
    scales: Vec<f32>,
    qkv: Aligned<f32, LANES>,
    mixed: Aligned<f32, LANES>,
    ffn: Aligned<f32, LANES>,
    /// A half's result where it is normed before it joins `hidden`.
    branch: Aligned<f32, LANES>,
    experts: Option<ExpertWork>,
    quantised: Quantised,
    scores: Aligned<f32, LANES>,
    /// The hidden state and logits of positions that choose a token.
    picked: Aligned<f32, LANES>,
    logits: Aligned<f32, LANES>,
    tokens: Vec<Token>,
    positions: Vec<u32>,
    /// Token index of each position that chooses a token: of rows that sample, then of their drafts.
    last: Vec<usize>,
    samplers: Vec<Sampler>,
}

// === impl CpuEngine ===

impl CpuEngine {
    /// An engine with its own KV pool and workspace; weights and threads are shared.
    ///
    /// # Errors
    /// A size of the configuration is impossible.
    pub fn new(model: Arc<Model>, pool: ComputePool, config: EngineConfig) -> Result<Self, ConfigError> {
        config.check(&model.spec)?;
        let spec = &model.spec;
        let plan = KvPlan::for_blocks(spec, config.block_tokens, config.n_blocks);
        let tables = |rope: &_| RopeTables::new(rope, spec.head_dim, config.context_tokens);
        Ok(Self {
            kv: KvPool::allocate(spec, &plan),
            rope: tables(&spec.rope),
            window_rope: spec.window_rope.as_ref().map(tables),
            work: Workspace::allocate(&model, &config, pool.isa()),
            model,
            pool,
            config,
        })
    }

    /// Memory by owner.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        let ropes = std::iter::once(&self.rope).chain(&self.window_rope);
        MemoryUse {
            weights: self.model.bytes(),
            kv: KvPlan::for_blocks(&self.model.spec, self.config.block_tokens, self.config.n_blocks).bytes(),
            workspace: self.work.bytes() + ropes.map(RopeTables::bytes).sum::<usize>(),
        }
    }

    /// The sizes it was made with.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The model it computes.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Logits of the `i`-th sampling row of the last step, before penalties and bias.
    #[must_use]
    pub fn logits(&self, i: usize) -> Vec<f32> {
        let rows = self.work.last.len();
        let panels = self.model.spec.vocab.div_ceil(LANES);
        let row = (0..panels).flat_map(|panel| self.work.logits[panel * stride(rows) + i]);
        row.take(self.model.spec.vocab).collect()
    }

    fn forward(&mut self, plan: &StepPlan) {
        self.work.begin(plan);
        self.embed(plan);
        let model = Arc::clone(&self.model);
        for (i, layer) in model.layers.iter().enumerate() {
            self.attention_half(plan, i, layer);
            self.ffn_half(layer);
        }
    }

    /// How likely prompt tokens were. Their logits are computed in pieces, in the places of those that choose tokens: a prompt
    /// is long, and a row of logits may be a megabyte. `None` where a row has no finite logit.
    fn score(&mut self, plan: &StepPlan, scores: &mut Vec<TokenLogprobs>) -> Option<()> {
        let most = self.work.samplers.len();
        for Score { after, next, top } in &plan.scores {
            let next = &plan.scored[next.start as usize..next.end as usize];
            let after: Vec<usize> = after.clone().map(|token| token as usize).collect();
            for (after, next) in after.chunks(most).zip(next.chunks(most)) {
                self.work.last.clear();
                self.work.last.extend_from_slice(after);
                self.project();
                let Workspace { logits, samplers, .. } = &mut self.work;
                let (logits, vocab, rows) = (&*logits, self.model.spec.vocab, next.len());
                self.pool.split(4 * vocab * rows, &mut samplers[..rows], 1, |first, samplers| {
                    for (i, sampler) in samplers.iter_mut().enumerate() {
                        sampler.fill(logits.iter().skip(first + i).step_by(stride(rows)));
                        sampler.scored = sampler.score(next[first + i], *top);
                    }
                });
                for sampler in &mut samplers[..rows] {
                    scores.push(sampler.scored.take()?);
                }
            }
        }
        Some(())
    }

    fn embed(&mut self, plan: &StepPlan) {
        let step = stride(plan.tokens.len());
        let (embedding, scale) = (self.model.embedding(), self.model.spec.embedding_scale);
        for (row, &token) in plan.tokens.iter().enumerate() {
            let put = |k: usize, x: f32| self.work.hidden[k / LANES * step + row][k % LANES] = x * scale;
            embedding.gather(token as usize, put);
        }
    }

    fn attention_half(&mut self, plan: &StepPlan, index: usize, layer: &Layer) {
        self.project_heads(index, layer);
        self.write_heads(plan, index);
        let (pool, spec) = (&self.pool, &self.model.spec);
        let Workspace { hidden, branch, scales, qkv, mixed, quantised, scores, tokens, positions, .. } = &mut self.work;
        let rows = tokens.len();
        let head = spec.head_dim / LANES * stride(rows);
        let q_len = spec.heads * head;
        let attention = Attention {
            isa: pool.isa(),
            kv: &self.kv,
            layer: index,
            tokens,
            blocks: &plan.blocks,
            q: &qkv[..q_len],
            head_dim: spec.head_dim,
            group: spec.heads / spec.kv_heads,
            scale: spec.score_scale,
            cap: spec.score_cap,
            window: spec.window_of(index),
        };
        let scores_unit = scores.len() / spec.heads;
        let seen: usize = positions.iter().map(|&position| position as usize + 1).sum();
        let work = 2 * seen * spec.q_dim();
        let units = Units { items: &mut mixed[..q_len], unit: head, scratch: scores, scratch_unit: scores_unit };
        pool.split_with(work, units, |first, mixed, scores| attention.heads(first, scores, mixed));
        let input = Input { x: mixed, rows, quantised };
        join(pool, &layer.out, input, layer.post_attention_norm.as_ref(), (branch, scales, hidden));
        if let Some(bias) = &layer.out_bias {
            rows::add_bias(pool.isa(), bias, hidden, rows);
        }
    }

    /// Queries, keys and values of the step's tokens, turned to their positions.
    fn project_heads(&mut self, index: usize, layer: &Layer) {
        let (pool, isa, spec) = (&self.pool, self.pool.isa(), &self.model.spec);
        let Workspace { hidden, normed, scales, qkv, quantised, positions, .. } = &mut self.work;
        let rows = positions.len();
        rms_norm(pool, &layer.attention_norm, hidden, Normed { rows, scales, out: normed });
        matmul(pool, &layer.qkv, Input { x: normed, rows, quantised }, qkv, Epilogue::Store);
        if let Some(bias) = &layer.qkv_bias {
            rows::add_bias(isa, bias, qkv, rows);
        }
        let head = spec.head_dim / LANES * stride(rows);
        let (q, kv) = qkv.split_at_mut(spec.heads * head);
        let k = &mut kv[..spec.kv_heads * head];
        if let Some([q_norm, k_norm]) = &layer.qk_norms {
            norm_heads(isa, q_norm, q, rows);
            norm_heads(isa, k_norm, k, rows);
        }
        let rope = self.window_rope.as_ref().filter(|_| spec.has_window_rope(index)).unwrap_or(&self.rope);
        rope.rotate(isa, q, positions);
        rope.rotate(isa, k, positions);
    }

    /// Keys and values go to their pages.
    fn write_heads(&mut self, plan: &StepPlan, layer: usize) {
        let spec = &self.model.spec;
        let Workspace { qkv, tokens, .. } = &self.work;
        let stride = stride(tokens.len());
        let head = spec.head_dim / LANES * stride;
        let (k, v) = qkv[spec.heads * head..].split_at(spec.kv_heads * head);
        for (row, token) in tokens.iter().enumerate() {
            let blocks = token.blocks_in(&plan.blocks);
            for kv_head in 0..spec.kv_heads {
                let key = Strided { panels: &k[kv_head * head..], stride, row };
                let value = Strided { panels: &v[kv_head * head..], stride, row };
                let position = token.position as usize;
                self.kv.write(Position { blocks, layer, head: kv_head, position }, key, value);
            }
        }
    }

    fn ffn_half(&mut self, layer: &Layer) {
        let (pool, spec) = (&self.pool, &self.model.spec);
        let Workspace { hidden, normed, scales, ffn, branch, experts, quantised, tokens, .. } = &mut self.work;
        let rows = tokens.len();
        let gated = match spec.activation {
            Activation::Silu => Epilogue::SiluMul,
            Activation::GeluTanh => Epilogue::GeluMul,
        };
        rms_norm(pool, &layer.ffn_norm, hidden, Normed { rows, scales, out: normed });
        match (&layer.ffn, experts, &spec.experts) {
            (Ffn::Dense(dense), ..) => {
                matmul(pool, &dense.gate_up, Input { x: normed, rows, quantised }, ffn, gated);
                let input = Input { x: ffn, rows, quantised };
                join(pool, &dense.down, input, layer.post_ffn_norm.as_ref(), (branch, scales, hidden));
            }
            (Ffn::Sparse { router, experts }, Some(work), Some(choice)) => {
                work.run(pool, Sparse { router, experts, choice, gated, ffn, quantised, rows }, normed, hidden);
            }
            (Ffn::Sparse { .. }, ..) => unreachable!("sparse layers are loaded for a specification with experts only"),
        }
    }

    /// Final norm and output head, for the positions that choose a token.
    fn project(&mut self) {
        let Workspace { hidden, normed, scales, quantised, picked, logits, tokens, last, .. } = &mut self.work;
        let (rows, n_picked) = (tokens.len(), last.len());
        if n_picked == 0 {
            return;
        }
        for panel in 0..self.model.spec.hidden / LANES {
            for (i, &token) in last.iter().enumerate() {
                picked[panel * stride(n_picked) + i] = hidden[panel * stride(rows) + token];
            }
        }
        rms_norm(&self.pool, &self.model.norm, picked, Normed { rows: n_picked, scales, out: normed });
        let input = Input { x: normed, rows: n_picked, quantised };
        matmul(&self.pool, &self.model.head, input, logits, Epilogue::Store);
        if let Some(cap) = self.model.spec.logit_cap {
            let vectors = self.model.head.n_panels() * (PANEL / LANES) * stride(n_picked);
            rows::cap(self.pool.isa(), cap, &mut logits[..vectors]);
        }
    }

    fn sample(&mut self, plan: &StepPlan, edits: &mut dyn EditSource) {
        let Workspace { logits, last, samplers, .. } = &mut self.work;
        let rows = last.len();
        let (logits, vocab) = (&*logits, self.model.spec.vocab);
        let samples = plan.rows.iter().filter(|row| row.sample.is_some());
        for (sampler, row) in samplers.iter_mut().zip(samples.clone()) {
            sampler.rule.clone_from(&row.sample);
            sampler.edit = edits.edit(row.request);
        }
        let drafts = samples.clone().flat_map(|row| (1..=row.drafts).map(move |ahead| (row, ahead)));
        for (sampler, (row, ahead)) in samplers[samples.count()..].iter_mut().zip(drafts) {
            sampler.rule = row.sample.as_ref().map(|rule| rule.ahead(ahead));
            sampler.edit = None;
        }
        // Choosing costs about as much as four multiply-adds per token of the vocabulary.
        self.pool.split(4 * vocab * rows, &mut samplers[..rows], 1, |first, samplers| {
            for (i, sampler) in samplers.iter_mut().enumerate() {
                sampler.fill(logits.iter().skip(first + i).step_by(stride(rows)));
                sampler.choose(&plan.history);
            }
        });
    }

    /// Multiply-adds of a step, roughly.
    fn cost(&self, plan: &StepPlan) -> usize {
        let spec = &self.model.spec;
        let ffn = spec.ffn * spec.experts.as_ref().map_or(1, |experts| experts.per_token);
        let layer = spec.hidden * (2 * spec.q_dim() + 2 * spec.kv_dim() + 3 * ffn);
        plan.tokens.len() * layer * spec.layers + (plan.rows.len() + plan.scored.len()) * spec.vocab * spec.hidden
    }
}

/// Adds a half's last product to the residual stream, normed before where the model says so.
fn join(
    pool: &ComputePool,
    w: &Matrix,
    input: Input<'_>,
    norm: Option<&Norm>,
    (branch, scales, hidden): (&mut [Lanes], &mut [f32], &mut [Lanes]),
) {
    let rows = input.rows;
    match norm {
        None => matmul(pool, w, input, hidden, Epilogue::Add),
        Some(norm) => {
            matmul(pool, w, input, branch, Epilogue::Store);
            rms_norm_add(pool, norm, branch, Normed { rows, scales, out: hidden });
        }
    }
}

impl Executor for CpuEngine {
    fn execute(
        &mut self,
        plan: &StepPlan,
        edits: &mut dyn EditSource,
        out: &mut StepOutput,
    ) -> Result<(), ExecuteError> {
        out.sampled.clear();
        out.after_drafts.clear();
        out.scores.clear();
        self.config.check_plan(plan, self.model.spec.vocab)?;
        if plan.rows.is_empty() {
            return Ok(());
        }
        let (pool, cost) = (self.pool.clone(), self.cost(plan));
        let no_logits = || ExecuteError::Device { what: "a row has no token with a finite logit".into() };
        let scored = pool.run(cost, || {
            self.forward(plan);
            let scored = self.score(plan, &mut out.scores);
            self.work.pick(plan);
            self.project();
            self.sample(plan, edits);
            scored
        });
        scored.ok_or_else(no_logits)?;
        let (rows, n_samples) = (self.work.last.len(), plan.rows.iter().filter(|row| row.sample.is_some()).count());
        for (i, sampler) in self.work.samplers[..rows].iter_mut().enumerate() {
            sampler.rule = None;
            match sampler.chosen.take() {
                Some(sampled) if i < n_samples => out.sampled.push(sampled),
                Some(sampled) => out.after_drafts.push(sampled),
                None => return Err(no_logits()),
            }
        }
        Ok(())
    }

    fn draft_places(&self) -> u32 {
        self.model.draft_places()
    }

    fn scores_prompts(&self) -> bool {
        true
    }
}

// === impl Workspace ===

impl Workspace {
    fn allocate(model: &Model, config: &EngineConfig, isa: super::Isa) -> Self {
        let spec = &model.spec;
        let EngineConfig { max_step_tokens: tokens, max_rows, context_tokens, .. } = *config;
        let zeros = |n: usize| Aligned::filled(0.0, n);
        let panels = |width: usize, rows: usize| zeros(width.next_multiple_of(PANEL) / LANES * stride(rows));
        let dense = spec.experts.iter().flat_map(|experts| experts.dense.iter().flatten()).copied();
        let ffn = dense.fold(spec.ffn, usize::max);
        let widest = spec.hidden.max(spec.q_dim()).max(ffn);
        let most = tokens.max(max_rows);
        Self {
            hidden: panels(spec.hidden, tokens),
            normed: panels(spec.hidden, most),
            scales: vec![0.0; most],
            qkv: panels(spec.q_dim() + 2 * spec.kv_dim(), tokens),
            mixed: panels(spec.q_dim(), tokens),
            ffn: panels(ffn, tokens),
            branch: if spec.post_norms { panels(spec.hidden, tokens) } else { zeros(0) },
            experts: spec.experts.as_ref().map(|experts| ExpertWork::allocate(spec, experts, tokens)),
            quantised: Quantised::allocate(widest, most),
            scores: zeros(spec.heads * context_tokens.div_ceil(LANES)),
            picked: panels(spec.hidden, max_rows),
            logits: panels(spec.vocab, max_rows),
            tokens: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            last: Vec::with_capacity(max_rows),
            samplers: (0..max_rows).map(|_| Sampler::allocate(spec.vocab, isa)).collect(),
        }
    }

    fn bytes(&self) -> usize {
        let Self { hidden, normed, qkv, mixed, ffn, branch, experts, quantised, scores, picked, logits, .. } = self;
        let lanes = [hidden, normed, qkv, mixed, ffn, branch, scores, picked, logits].map(|v| v.len());
        let samplers: usize = self.samplers.iter().map(Sampler::bytes).sum();
        let experts = experts.as_ref().map_or(0, ExpertWork::bytes);
        lanes.iter().sum::<usize>() * size_of::<Lanes>()
            + 4 * self.scales.len()
            + quantised.bytes()
            + samplers
            + experts
    }

    /// Lists the tokens of a step.
    fn begin(&mut self, plan: &StepPlan) {
        let Self { tokens, positions, .. } = self;
        tokens.clear();
        positions.clear();
        for row in &plan.rows {
            let blocks = (row.blocks.start, row.blocks.end);
            for i in 0..row.tokens.end - row.tokens.start {
                let position = row.position + i;
                tokens.push(Token { position, blocks });
                positions.push(position);
            }
        }
    }

    /// Lists the positions that choose a token.
    fn pick(&mut self, plan: &StepPlan) {
        let last = &mut self.last;
        last.clear();
        for row in &plan.rows {
            if row.sample.is_some() {
                last.push((row.tokens.end - row.drafts) as usize - 1);
            }
        }
        for row in &plan.rows {
            last.extend((row.tokens.end - row.drafts..row.tokens.end).map(|token| token as usize));
        }
    }
}
