//! An encoder's weights, checked and packed.

use super::super::isa::{LANES, Lanes};
use super::super::matrix::{Join, Matrix};
use super::norm::Norm;
use crate::load::{LoadError, Weights};
use crate::spec::EncoderSpec;

/// All of them.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) words: Matrix,
    /// By place in the text; what a token's type adds is in it.
    pub(super) positions: Vec<Vec<f32>>,
    pub(super) norm: Norm,
    pub(super) layers: Vec<Layer>,
}

/// The biases of the products that end in the residual stream are added by the norms after them.
#[derive(Debug)]
pub(super) struct Layer {
    /// q, k and v, one after the other.
    pub(super) qkv: Matrix,
    pub(super) qkv_bias: Vec<Lanes>,
    pub(super) out: Matrix,
    pub(super) attention_norm: Norm,
    pub(super) up: Matrix,
    pub(super) up_bias: Vec<Lanes>,
    pub(super) down: Matrix,
    pub(super) ffn_norm: Norm,
}

struct Loader<'a> {
    spec: &'a EncoderSpec,
    weights: &'a Weights,
    /// What stands before every name: a checkpoint that was made for a task has its encoder one level down.
    prefix: &'static str,
}

// === impl Packed ===

impl Packed {
    pub(super) fn load(spec: &EncoderSpec, weights: &Weights) -> Result<Self, LoadError> {
        let has = |prefix: &&str| weights.has(&format!("{prefix}embeddings.word_embeddings.weight"));
        let prefix = ["bert.", "roberta."].into_iter().find(has).unwrap_or_default();
        let loader = Loader { spec, weights, prefix };
        let words = weights.get(&loader.full("embeddings.word_embeddings.weight"), &[spec.vocab, spec.hidden])?;
        Ok(Self {
            words: Matrix::pack_as_stored(&[words], spec.hidden, Join::Concat),
            positions: loader.positions()?,
            norm: loader.norm("embeddings.LayerNorm", None)?,
            layers: (0..spec.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        let positions: usize = self.positions.iter().map(|row| size_of_val(row.as_slice())).sum();
        self.words.bytes() + positions + self.norm.bytes() + self.layers.iter().map(Layer::bytes).sum::<usize>()
    }

    /// Multiply-adds of a token's products.
    pub(super) fn products(&self) -> usize {
        let of =
            |layer: &Layer| [&layer.qkv, &layer.out, &layer.up, &layer.down].map(|w| w.n * w.k).iter().sum::<usize>();
        self.layers.iter().map(of).sum()
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        let Self { qkv, qkv_bias, out, attention_norm, up, up_bias, down, ffn_norm } = self;
        let matrices = [qkv, out, up, down].map(Matrix::bytes).iter().sum::<usize>();
        let biases = [qkv_bias, up_bias].map(|bias| size_of_val(bias.as_slice())).iter().sum::<usize>();
        matrices + biases + attention_norm.bytes() + ffn_norm.bytes()
    }
}

// === impl Loader ===

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, LoadError> {
        let EncoderSpec { hidden, ffn, .. } = *self.spec;
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let qkv = ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}")));
        let matrix = |part: &str, n, k| self.matrix(&name(&format!("{part}.dense.weight")), n, k);
        let norm =
            |part: &str| self.norm(&name(&format!("{part}.LayerNorm")), Some(&name(&format!("{part}.dense.bias"))));
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        for part in &qkv {
            weights.push(self.weights.get(&self.full(&format!("{part}.weight")), &[hidden, hidden])?);
            biases.extend(self.vector(&format!("{part}.bias"), hidden)?);
        }
        Ok(Layer {
            qkv: Matrix::pack(&weights, hidden, Join::Concat),
            qkv_bias: biases,
            out: matrix("attention.output", hidden, hidden)?,
            attention_norm: norm("attention.output")?,
            up: matrix("intermediate", ffn, hidden)?,
            up_bias: self.vector(&name("intermediate.dense.bias"), ffn)?,
            down: matrix("output", hidden, ffn)?,
            ffn_norm: norm("output")?,
        })
    }

    /// Rows of the table from the first place on, with the type of every token added.
    fn positions(&self) -> Result<Vec<Vec<f32>>, LoadError> {
        let EncoderSpec { hidden, positions, first_position, max_tokens, types, .. } = *self.spec;
        let get = |name: &str, n| self.weights.get(&self.full(&format!("embeddings.{name}.weight")), &[n, hidden]);
        let table = get("position_embeddings", positions)?;
        let kind = get("token_type_embeddings", types)?;
        let row = |i: usize| (0..hidden).map(|k| table.f32((first_position + i) * hidden + k) + kind.f32(k)).collect();
        Ok((0..max_tokens).map(row).collect())
    }

    /// `bias` is the name of what is added before.
    fn norm(&self, name: &str, bias: Option<&str>) -> Result<Norm, LoadError> {
        let hidden = self.spec.hidden;
        Ok(Norm {
            before: bias.map(|bias| self.vector(bias, hidden)).transpose()?,
            gain: self.vector(&format!("{name}.weight"), hidden)?,
            bias: self.vector(&format!("{name}.bias"), hidden)?,
            eps: self.spec.norm_eps,
        })
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Matrix, LoadError> {
        Ok(Matrix::pack(&[self.weights.get(&self.full(name), &[n, k])?], k, Join::Concat))
    }

    fn vector(&self, name: &str, n: usize) -> Result<Vec<Lanes>, LoadError> {
        Ok(self.weights.get(&self.full(name), &[n])?.to_f32().as_chunks::<LANES>().0.to_vec())
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}
