//! Sentence encoders: texts in, one vector each out.
//!
//! The sequences of a batch stand one after the other without padding: every product is over all rows at once, and attention
//! alone works sequence by sequence. As in the engine, each value is one fixed chain, so a text's vector does not depend on
//! its batch. No pages and no cache: keys and values live for one layer.

mod attention;
mod norm;
mod weights;

use std::ops::Range;

use pointsman_sched::execute::ExecuteError;

use self::attention::Attention;
use self::norm::{BiasGelu, add_and_norm};
use self::weights::{Layer, Packed};
use super::aligned::Aligned;
use super::engine::MemoryUse;
use super::gemm::{Epilogue, Input, matmul};
use super::isa::{LANES, Lanes, stride};
use super::matrix::{Matrix, PANEL};
use super::pool::{ComputePool, Units};
use super::quant::Quantised;
use super::rows;
use crate::load::{LoadError, Weights};
use crate::spec::{EncoderSpec, Pooling};

/// Multiply-adds that a GELU costs, about.
const GELU_WORK: usize = 16;

/// A loaded encoder with room for a batch.
#[derive(Debug)]
pub struct Encoder {
    spec: EncoderSpec,
    packed: Packed,
    pool: ComputePool,
    batch_tokens: usize,
    work: Workspace,
}

/// Activations, all panel-major: `[width / 16][stride(tokens of the batch)][16]`.
#[derive(Debug)]
struct Workspace {
    hidden: Aligned<f32, LANES>,
    qkv: Aligned<f32, LANES>,
    mixed: Aligned<f32, LANES>,
    ffn: Aligned<f32, LANES>,
    /// Of each head: the keys of a sequence, turned, and the weights of a few rows.
    heads: Aligned<f32, LANES>,
    sequences: Vec<Range<usize>>,
    /// Empty: encoders are computed as they are stored, in floats.
    quantised: Quantised,
}

// === impl Encoder ===

impl Encoder {
    /// Checks and packs the weights as the file has them. A batch has at most `batch_tokens` tokens, and always room for the
    /// longest text.
    ///
    /// # Errors
    /// A tensor is missing, or has another shape or type than the specification asks for.
    pub fn load(
        spec: EncoderSpec,
        weights: &Weights,
        pool: ComputePool,
        batch_tokens: usize,
    ) -> Result<Self, LoadError> {
        let batch_tokens = batch_tokens.max(spec.max_tokens);
        let work = Workspace::allocate(&spec, batch_tokens);
        Ok(Self { packed: Packed::load(&spec, weights)?, spec, pool, batch_tokens, work })
    }

    /// What the model is.
    #[must_use]
    pub fn spec(&self) -> &EncoderSpec {
        &self.spec
    }

    /// Tokens that a batch may have.
    #[must_use]
    pub fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    /// Memory by owner.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        MemoryUse { weights: self.packed.bytes(), kv: 0, workspace: self.work.bytes() }
    }

    /// One vector for each sequence of tokens, in their order.
    ///
    /// # Errors
    /// A sequence or the batch is longer than was promised, or names a token that does not exist: a bug of the host.
    pub fn encode(&mut self, batch: &[&[u32]]) -> Result<Vec<Vec<f32>>, ExecuteError> {
        self.check(batch)?;
        let tokens: usize = batch.iter().map(|tokens| tokens.len()).sum();
        if tokens == 0 {
            return Ok(Vec::new());
        }
        let pool = self.pool.clone();
        Ok(pool.run(tokens * self.packed.products(), || {
            self.embed(batch, tokens);
            let Self { spec, packed, pool, work, .. } = self;
            packed.layers.iter().for_each(|layer| work.layer(spec, pool, layer, tokens));
            work.sequences.iter().map(|rows| work.pooled(spec, rows, tokens)).collect()
        }))
    }

    fn check(&self, batch: &[&[u32]]) -> Result<(), ExecuteError> {
        let expect = |holds: bool, what| if holds { Ok(()) } else { Err(ExecuteError::Malformed { what }) };
        let lengths = || batch.iter().map(|tokens| tokens.len());
        expect(lengths().all(|n| (1..=self.spec.max_tokens).contains(&n)), "a text that is empty or too long")?;
        expect(lengths().sum::<usize>() <= self.batch_tokens, "more tokens than batch_tokens")?;
        let known = |&token: &u32| (token as usize) < self.spec.vocab;
        expect(batch.iter().all(|tokens| tokens.iter().all(known)), "a token outside the vocabulary")
    }

    /// Words and positions, normed.
    fn embed(&mut self, batch: &[&[u32]], rows: usize) {
        let Self { packed, pool, work, .. } = self;
        let step = stride(rows);
        work.sequences.clear();
        let mut row = 0;
        for &tokens in batch {
            work.sequences.push(row..row + tokens.len());
            for (&token, position) in tokens.iter().zip(&packed.positions) {
                let put = |k: usize, x: f32| work.hidden[k / LANES * step + row][k % LANES] = x + position[k];
                packed.words.gather(token as usize, put);
                row += 1;
            }
        }
        add_and_norm(pool.isa(), &packed.norm, &mut work.hidden, rows);
    }
}

// === impl Workspace ===

impl Workspace {
    fn allocate(spec: &EncoderSpec, tokens: usize) -> Self {
        let zeros = |n: usize| Aligned::filled(0.0, n);
        let panels = |width: usize| zeros(width.next_multiple_of(PANEL) / LANES * stride(tokens));
        Self {
            hidden: panels(spec.hidden),
            qkv: panels(3 * spec.hidden),
            mixed: panels(spec.hidden),
            ffn: panels(spec.ffn),
            heads: zeros(spec.heads * attention::scratch(spec.head_dim(), spec.max_tokens)),
            sequences: Vec::new(),
            quantised: Quantised::allocate(0, 0),
        }
    }

    fn bytes(&self) -> usize {
        let Self { hidden, qkv, mixed, ffn, heads, sequences: _, quantised: _ } = self;
        [hidden, qkv, mixed, ffn, heads].map(|v| v.len()).iter().sum::<usize>() * size_of::<Lanes>()
    }

    fn layer(&mut self, spec: &EncoderSpec, pool: &ComputePool, layer: &Layer, rows: usize) {
        self.attend(spec, pool, layer, rows);
        let Self { hidden, mixed, ffn, quantised, .. } = self;
        let mut product = |w: &Matrix, x: &[Lanes], out: &mut [Lanes], epilogue| {
            matmul(pool, w, Input { x, rows, quantised }, out, epilogue);
        };
        product(&layer.out, mixed, hidden, Epilogue::Add);
        add_and_norm(pool.isa(), &layer.attention_norm, hidden, rows);
        product(&layer.up, hidden, ffn, Epilogue::Store);
        let unit = stride(rows);
        let inner = &mut ffn[..spec.ffn / LANES * unit];
        pool.split(inner.len() * LANES * GELU_WORK, inner, unit, |first, x| {
            pool.isa().run(BiasGelu { bias: &layer.up_bias[first..], x, rows, tanh: spec.gelu_tanh });
        });
        product(&layer.down, ffn, hidden, Epilogue::Add);
        add_and_norm(pool.isa(), &layer.ffn_norm, hidden, rows);
    }

    /// Every head looks at every token of its sequence.
    fn attend(&mut self, spec: &EncoderSpec, pool: &ComputePool, layer: &Layer, rows: usize) {
        let Self { hidden, qkv, mixed, heads, sequences, quantised, .. } = self;
        matmul(pool, &layer.qkv, Input { x: hidden, rows, quantised }, qkv, Epilogue::Store);
        rows::add_bias(pool.isa(), &layer.qkv_bias, qkv, rows);
        let head_dim = spec.head_dim();
        let attention = Attention { isa: pool.isa(), qkv, sequences, rows, heads: spec.heads, head_dim };
        let unit = attention.unit();
        let scratch_unit = heads.len() / spec.heads;
        let work = sequences.iter().map(|rows| 2 * rows.len().pow(2) * spec.hidden).sum();
        let units = Units { items: &mut mixed[..spec.heads * unit], unit, scratch: heads, scratch_unit };
        pool.split_with(work, units, |first, mixed, scratch| attention.heads_from(first, scratch, mixed));
    }

    /// The vector of the sequence that has these rows.
    fn pooled(&self, spec: &EncoderSpec, rows: &Range<usize>, n_rows: usize) -> Vec<f32> {
        let step = stride(n_rows);
        let rows = match spec.pooling {
            Pooling::First => rows.start..rows.start + 1,
            Pooling::Mean => rows.clone(),
        };
        let mut vector = Vec::with_capacity(spec.hidden);
        for panel in 0..spec.hidden / LANES {
            let panel = &self.hidden[panel * step..];
            let mean = |i: usize| panel[rows.clone()].iter().map(|x| x[i]).sum::<f32>() / rows.len() as f32;
            vector.extend((0..LANES).map(mean));
        }
        if spec.normalised {
            let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            vector.iter_mut().for_each(|x| *x /= length);
        }
        vector
    }
}
