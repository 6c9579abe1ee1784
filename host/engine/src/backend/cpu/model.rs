//! A model's weights, checked and packed: immutable, shared by the replicas of a device.

use std::cell::RefCell;

use super::isa::{LANES, Lanes};
use super::matrix::{Join, Matrix};
use super::norm::Norm;
use crate::layers::GatedParts;
use crate::load::{Elements, LoadError, Weights, quantise_q8_0};
use crate::spec::ModelSpec;

/// What is larger is read from memory in every step.
const LARGEST_CACHE: usize = 256 << 20;

/// How weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As the file has them: 16 bits (`f16` or `bf16`; `f32` stays `f32`), widened in register; blocks of a GGUF file in their bits,
    /// scales of Q8_0 as integers where K is a multiple of 256.
    F16,
    /// 8 bits in blocks of 32 along K with an `f16` scale (GGML's Q8_0), made at load. The CPU multiplies them with 8-bit
    /// activations, a GPU with those of its type.
    Q8_0,
    /// 8-bit floats (e4m3) with an `f32` scale for each row, made at load; on a GPU alone.
    Fp8,
}

/// A name that is no precision's. The configuration is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no precision: use f16, q8_0 or fp8")]
pub struct UnknownPrecision(String);

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
    pub(super) qkv_bias: Option<Vec<Lanes>>,
    /// Norms of each head of q and of k.
    pub(super) qk_norms: Option<[Norm; 2]>,
    pub(super) out: Matrix,
    pub(super) out_bias: Option<Vec<Lanes>>,
    pub(super) post_attention_norm: Option<Norm>,
    pub(super) ffn_norm: Norm,
    pub(super) ffn: Ffn,
    pub(super) post_ffn_norm: Option<Norm>,
}

/// The second half of a layer.
#[derive(Debug)]
pub(super) enum Ffn {
    Dense(Gated),
    Sparse { router: Matrix, experts: Vec<Gated> },
}

#[derive(Debug)]
pub(super) struct Gated {
    /// Gate and up, alternating every sixteen columns.
    pub(super) gate_up: Matrix,
    pub(super) down: Matrix,
}

/// Told the bytes of the file that are packed; no longer loaded once it says no.
pub type Progress<'a> = dyn FnMut(u64) -> bool + 'a;

struct Loader<'a> {
    spec: &'a ModelSpec,
    weights: &'a Weights,
    precision: Precision,
    progress: RefCell<(&'a mut Progress<'a>, u64)>,
}

// === impl Precision ===

impl Precision {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F16, Self::Q8_0, Self::Fp8];

    /// As in names of variants.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Fp8 => "fp8",
        }
    }
}

impl std::str::FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(name: &str) -> Result<Self, UnknownPrecision> {
        let found = Self::ALL.into_iter().find(|precision| precision.name() == name);
        found.ok_or_else(|| UnknownPrecision(name.to_owned()))
    }
}

// === impl Model ===

impl Model {
    /// Checks, packs and, where asked, quantises the weights of a model.
    ///
    /// # Errors
    /// A tensor is missing, or has another shape or type than the specification asks for.
    pub fn load(spec: ModelSpec, weights: &Weights, precision: Precision) -> Result<Self, LoadError> {
        Self::load_watched(spec, weights, precision, &mut |_| true)
    }

    /// The same, with `progress` told the bytes of the files that are done after each matrix.
    ///
    /// # Errors
    /// As [`load`](Self::load); or `progress` said no.
    pub fn load_watched(
        spec: ModelSpec,
        weights: &Weights,
        precision: Precision,
        progress: &mut Progress<'_>,
    ) -> Result<Self, LoadError> {
        let mut told = |done| progress(done);
        let loader = Loader { spec: &spec, weights, precision, progress: RefCell::new((&mut told, 0)) };
        let embedding = weights.get("model.embed_tokens.weight", &[spec.vocab, spec.hidden])?;
        let (head, untied_embedding) = if spec.tied {
            (loader.packed_by(Matrix::pack_as_stored, &[embedding], spec.hidden, Join::Concat)?, None)
        } else {
            let head = loader.matrix("lm_head.weight", spec.vocab, spec.hidden)?;
            let table = Matrix::pack_as_stored(std::slice::from_ref(&embedding), spec.hidden, Join::Concat);
            loader.packed_all(&[embedding])?;
            (head, Some(table))
        };
        let layers = (0..spec.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let norm = loader.norm("model.norm.weight", spec.hidden)?;
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
        self.layers.iter().map(Layer::bytes).sum::<usize>()
            + self.norm.bytes()
            + self.head.bytes()
            + self.untied_embedding.as_ref().map_or(0, Matrix::bytes)
    }

    /// Bytes that a step reads whatever its tokens: all but an embedding of its own.
    #[must_use]
    pub fn read_bytes(&self) -> usize {
        self.bytes() - self.untied_embedding.as_ref().map_or(0, Matrix::bytes)
    }

    /// See [`Executor::draft_places`](pointsman_sched::execute::Executor::draft_places).
    pub(super) fn draft_places(&self) -> u32 {
        // Each of several tokens may ask for experts of its own.
        if self.spec.experts.is_some() {
            return 0;
        }
        draft_places(self.read_bytes(), self.layers.iter().all(Layer::is_quantised))
    }

    /// Rows of the embedding, by token.
    pub(super) fn embedding(&self) -> &Matrix {
        self.untied_embedding.as_ref().unwrap_or(&self.head)
    }
}

/// A step waits for weights that no cache holds, and multiplies integers meanwhile: with 1.1 GB of Q8_0, 8 tokens cost 1.2 to
/// 1.4 times what one does. The weights of a small model are there at once, and products of floats take as long as a large
/// one's weights: 4 tokens cost 1.2 to 1.4 times what one does, and 8 twice as much or more.
fn draft_places(read_bytes: usize, is_quantised: bool) -> u32 {
    if is_quantised && read_bytes > LARGEST_CACHE { 8 } else { 4 }
}

impl Layer {
    /// Whether all products are of integers.
    fn is_quantised(&self) -> bool {
        let Ffn::Dense(Gated { gate_up, down }) = &self.ffn else { return false };
        [&self.qkv, &self.out, gate_up, down].into_iter().all(Matrix::is_quantised)
    }

    fn bytes(&self) -> usize {
        let Self { attention_norm, qkv, qkv_bias, qk_norms, out, out_bias, post_attention_norm, .. } = self;
        let Self { ffn_norm, ffn, post_ffn_norm, .. } = self;
        let norms = [attention_norm, ffn_norm].into_iter().chain(post_attention_norm).chain(post_ffn_norm);
        let norms = norms.chain(qk_norms.iter().flatten()).map(Norm::bytes).sum::<usize>();
        let biases = [qkv_bias, out_bias].into_iter().flatten().map(|bias| size_of_val(bias.as_slice()));
        let gated = |gated: &Gated| gated.gate_up.bytes() + gated.down.bytes();
        let ffn = match ffn {
            Ffn::Dense(dense) => gated(dense),
            Ffn::Sparse { router, experts } => router.bytes() + experts.iter().map(gated).sum::<usize>(),
        };
        norms + biases.sum::<usize>() + qkv.bytes() + out.bytes() + ffn
    }
}

// === impl Loader ===

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, LoadError> {
        let spec = self.spec;
        let (hidden, q_dim) = (spec.hidden, spec.q_dim());
        let attention = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let norm = |part: &str| self.norm(&format!("model.layers.{layer}.{part}.weight"), hidden);
        let head_norm = |part: &str| self.norm(&attention(&format!("{part}.weight")), spec.head_dim);
        let (ffn_norm, after) = match spec.post_norms {
            true => ("pre_feedforward_layernorm", Some(("post_attention_layernorm", "post_feedforward_layernorm"))),
            false => ("post_attention_layernorm", None),
        };
        Ok(Layer {
            attention_norm: norm("input_layernorm")?,
            qkv: self.packed(&self.weights.qkv(spec, layer)?, hidden, Join::Concat)?,
            qkv_bias: match spec.qkv_bias {
                true => Some(lanes(&self.weights.qkv_bias(spec, layer)?)),
                false => None,
            },
            qk_norms: match spec.qk_norm {
                true => Some([head_norm("q_norm")?, head_norm("k_norm")?]),
                false => None,
            },
            out: self.matrix(&attention("o_proj.weight"), hidden, q_dim)?,
            out_bias: match spec.out_bias {
                true => Some(lanes(&[self.weights.get(&attention("o_proj.bias"), &[hidden])?])),
                false => None,
            },
            post_attention_norm: after.map(|(name, _)| norm(name)).transpose()?,
            ffn_norm: norm(ffn_norm)?,
            ffn: self.ffn(layer)?,
            post_ffn_norm: after.map(|(_, name)| norm(name)).transpose()?,
        })
    }

    fn ffn(&self, layer: usize) -> Result<Ffn, LoadError> {
        let (spec, weights) = (self.spec, self.weights);
        let (dense, experts) = match &spec.experts {
            None => (Some(spec.ffn), None),
            Some(experts) => (experts.dense[layer], Some(experts)),
        };
        let (None, Some(experts)) = (dense, experts) else {
            let ffn = dense.unwrap_or(spec.ffn);
            return Ok(Ffn::Dense(self.gated(&weights.dense(spec, layer, ffn)?, ffn)?));
        };
        // A choice between experts may hang on the last bit, so the router stays as the file has it.
        let router = weights.router(spec, layer, experts.count)?;
        let all = weights.experts(spec, layer, experts)?;
        Ok(Ffn::Sparse {
            router: Matrix::pack(&[router], spec.hidden, Join::Concat),
            experts: all.iter().map(|expert| self.gated(expert, spec.ffn)).collect::<Result<_, _>>()?,
        })
    }

    fn gated(&self, parts: &GatedParts<'_>, ffn: usize) -> Result<Gated, LoadError> {
        let GatedParts { gate_up, down } = parts;
        Ok(Gated {
            gate_up: self.packed(gate_up, self.spec.hidden, Join::Interleave)?,
            down: self.packed(std::slice::from_ref(down), ffn, Join::Concat)?,
        })
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Matrix, LoadError> {
        self.packed(&[self.weights.get(name, &[n, k])?], k, Join::Concat)
    }

    fn packed(&self, parts: &[Elements<'_>], k: usize, join: Join) -> Result<Matrix, LoadError> {
        self.packed_by(Matrix::pack, parts, k, join)
    }

    fn packed_by(
        &self,
        pack: fn(&[Elements<'_>], usize, Join) -> Matrix,
        parts: &[Elements<'_>],
        k: usize,
        join: Join,
    ) -> Result<Matrix, LoadError> {
        let packed = match self.precision {
            Precision::F16 => pack(parts, k, join),
            Precision::Q8_0 => {
                let parts = parts.iter().map(|part| quantise_q8_0(part, k)).collect::<Result<Vec<_>, _>>()?;
                pack(&parts, k, join)
            }
            Precision::Fp8 => return Err(LoadError::NotOnCpu),
        };
        self.packed_all(parts)?;
        Ok(packed)
    }

    /// Tells that these are done.
    fn packed_all(&self, parts: &[Elements<'_>]) -> Result<(), LoadError> {
        let (progress, done) = &mut *self.progress.borrow_mut();
        *done += parts.iter().map(|part| part.n_bytes() as u64).sum::<u64>();
        if progress(*done) { Ok(()) } else { Err(LoadError::Stopped) }
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm, LoadError> {
        let mut gain = self.weights.get(name, &[width])?.to_f32();
        if self.spec.norm_plus_one {
            gain.iter_mut().for_each(|gain| *gain += 1.0);
        }
        Ok(Norm { gain: gain.as_chunks::<LANES>().0.to_vec(), eps: self.spec.norm_eps })
    }
}

/// Vectors one after the other.
fn lanes(parts: &[Elements<'_>]) -> Vec<Lanes> {
    let all: Vec<f32> = parts.iter().flat_map(|part| (0..part.len()).map(|i| part.f32(i))).collect();
    all.as_chunks::<LANES>().0.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_have_places_where_a_step_waits_for_weights() {
        for (mebibytes, is_quantised, expect) in [(6, true, 4), (6, false, 4), (1_119, true, 8), (2_200, false, 4)] {
            assert_eq!(draft_places(mebibytes << 20, is_quantised), expect, "{mebibytes} MiB");
        }
    }
}
