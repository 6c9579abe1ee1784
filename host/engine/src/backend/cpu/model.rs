//! A model's weights, checked and packed: immutable, shared by the replicas of a device.

use super::isa::LANES;
use super::matrix::{Join, Matrix};
use super::norm::Norm;
use crate::load::{Elements, LoadError, Weights};
use crate::spec::ModelSpec;

/// How weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As the file has them, exactly: 16 bits (`f16` or `bf16`; `f32` stays `f32`), widened in register.
    F16,
    /// 8 bits in blocks of 32 along K with an `f16` scale (GGML's Q8_0), made at load; products with 8-bit activations.
    Q8_0,
}

/// A loaded model.
#[derive(Debug)]
pub struct Model {
    pub(super) spec: ModelSpec,
    precision: Precision,
    /// Absent when the head serves as the embedding.
    untied_embedding: Option<Matrix>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Norm,
    pub(super) head: Matrix,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Norm,
    /// q, k and v, one after the other.
    pub(super) qkv: Matrix,
    pub(super) out: Matrix,
    pub(super) ffn_norm: Norm,
    /// Gate and up, alternating every sixteen columns.
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
}

struct Loader<'a> {
    spec: &'a ModelSpec,
    weights: &'a Weights,
    precision: Precision,
}

impl Model {
    /// Checks, packs and, where asked, quantises the weights of a model.
    ///
    /// # Errors
    /// A tensor is missing, or has another shape or type than the specification asks for.
    pub fn load(spec: ModelSpec, weights: &Weights, precision: Precision) -> Result<Self, LoadError> {
        let loader = Loader { spec: &spec, weights, precision };
        let embedding = weights.get("model.embed_tokens.weight", &[spec.vocab, spec.hidden])?;
        let (head, untied_embedding) = if spec.tied {
            (loader.packed(&[embedding], spec.hidden, Join::Concat)?, None)
        } else {
            let head = loader.matrix("lm_head.weight", spec.vocab, spec.hidden)?;
            (head, Some(Matrix::pack(&[embedding], spec.hidden, Join::Concat)))
        };
        let layers = (0..spec.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let norm = loader.norm("model.norm.weight")?;
        Ok(Self { spec, precision, untied_embedding, layers, norm, head })
    }

    /// What the model is.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// How its weights are kept.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of the packed weights.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let norm = |norm: &Norm| size_of_val(norm.gain.as_slice());
        let layer = |layer: &Layer| {
            let Layer { attention_norm, qkv, out, ffn_norm, gate_up, down } = layer;
            norm(attention_norm) + norm(ffn_norm) + qkv.bytes() + out.bytes() + gate_up.bytes() + down.bytes()
        };
        self.layers.iter().map(layer).sum::<usize>()
            + norm(&self.norm)
            + self.head.bytes()
            + self.untied_embedding.as_ref().map_or(0, Matrix::bytes)
    }

    /// Rows of the embedding, by token.
    pub(super) fn embedding(&self) -> &Matrix {
        self.untied_embedding.as_ref().unwrap_or(&self.head)
    }
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, LoadError> {
        let ModelSpec { hidden, ffn, .. } = *self.spec;
        let (q_dim, kv_dim) = (self.spec.q_dim(), self.spec.kv_dim());
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let get = |part: &str, n: usize| self.weights.get(&name(part), &[n, hidden]);
        let qkv = [get("self_attn.q_proj", q_dim)?, get("self_attn.k_proj", kv_dim)?, get("self_attn.v_proj", kv_dim)?];
        let gate_up = [get("mlp.gate_proj", ffn)?, get("mlp.up_proj", ffn)?];
        Ok(Layer {
            attention_norm: self.norm(&name("input_layernorm"))?,
            qkv: self.packed(&qkv, hidden, Join::Concat)?,
            out: self.matrix(&name("self_attn.o_proj"), hidden, q_dim)?,
            ffn_norm: self.norm(&name("post_attention_layernorm"))?,
            gate_up: self.packed(&gate_up, hidden, Join::Interleave)?,
            down: self.matrix(&name("mlp.down_proj"), hidden, ffn)?,
        })
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Matrix, LoadError> {
        self.packed(&[self.weights.get(name, &[n, k])?], k, Join::Concat)
    }

    fn packed(&self, parts: &[Elements<'_>], k: usize, join: Join) -> Result<Matrix, LoadError> {
        match self.precision {
            Precision::F16 => Ok(Matrix::pack(parts, k, join)),
            Precision::Q8_0 => Matrix::quantise(parts, k, join),
        }
    }

    fn norm(&self, name: &str) -> Result<Norm, LoadError> {
        let gain = self.weights.get(name, &[self.spec.hidden])?.to_f32();
        Ok(Norm { gain: gain.as_chunks::<LANES>().0.to_vec(), eps: self.spec.norm_eps })
    }
}
