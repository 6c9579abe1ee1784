//! What distinguishes one decoder transformer from another, as data.
//!
//! Read in the order below: the description, then [`read`] (fields of a Hugging Face `config.json`), then `rope`, then `families` (what each
//! architecture adds to the fields that all share), then `gguf` (the same fields from a GGUF file). The reader accepts what the
//! forward pass computes and refuses the rest by name: a field that would silently change the mathematics is an error here,
//! never a wrong token later.

mod encoder;
mod families;
mod gguf;
mod read;
mod rope;
#[cfg(test)]
mod tests;

pub use encoder::{EncoderSpec, Pooling};
pub use read::{FieldError, SpecError};
pub use rope::{Rope, RopeScaling};

use crate::load::Weights;
use read::Fields;

/// A decoder transformer: RMSNorm before each half, rotate-half RoPE, grouped-query attention, a gated feed-forward half.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward half; of one expert where there are [`experts`](Self::experts).
    pub ffn: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// Whether a norm multiplies by `1 + gain` instead of `gain`.
    pub norm_plus_one: bool,
    /// Whether each half's result is normed, too, before it joins the residual stream.
    pub post_norms: bool,
    /// What the embedding is multiplied by.
    pub embedding_scale: f32,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// How positions turn queries and keys.
    pub rope: Rope,
    /// The same in the layers with a window, where they differ.
    pub window_rope: Option<Rope>,
    /// Layers that see only the last positions.
    pub window: Option<Window>,
    /// Whether the projections to q, k and v add a bias.
    pub qkv_bias: bool,
    /// Whether the projection out of attention adds a bias.
    pub out_bias: bool,
    /// Whether each head of q and k is normed before it is turned.
    pub qk_norm: bool,
    /// What a product of query and key is multiplied by.
    pub score_scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub score_cap: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub logit_cap: Option<f32>,
    /// Applied to the gate.
    pub activation: Activation,
    /// Sparse experts in place of the feed-forward half.
    pub experts: Option<Experts>,
    /// How the file names its tensors.
    pub naming: Naming,
}

/// Layers with a sliding window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Positions that a token sees, itself included.
    pub positions: usize,
    /// By layer, whether it has the window.
    pub layers: Vec<bool>,
}

/// What the gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The tanh form of GELU.
    GeluTanh,
}

/// Sparse experts: each token goes through a few of many feed-forward halves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token goes through.
    pub per_token: usize,
    /// Whether the weights of those few are made to sum to 1.
    pub normalised: bool,
    /// By layer: the width of its dense feed-forward half, where it has one instead of experts.
    pub dense: Vec<Option<usize>>,
}

/// How a checkpoint names and splits its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`; experts as `mlp.experts.N.gate_proj`.
    Split,
    /// `qkv_proj`; `gate_up_proj`.
    Packed,
    /// As [`Split`](Self::Split), with experts as `block_sparse_moe.experts.N.w1`, `w3`, `w2`.
    Mixtral,
    /// A GGUF file, which says itself what is packed; all experts of a layer in one tensor.
    Gguf {
        /// Whether rows of q and k alternate between the two halves of a head.
        interleaved: bool,
    },
}

impl ModelSpec {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// The first field that is missing, impossible or not supported.
    pub fn from_config(json: &[u8]) -> Result<Self, SpecError> {
        families::from_fields(&Fields::parse(json)?).map_err(SpecError::Config)
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// The first value that is missing, impossible or not supported; weights that are not of a GGUF file have none.
    pub fn from_gguf(weights: &Weights) -> Result<Self, SpecError> {
        gguf::from_gguf(weights)
    }

    /// Checks that the kernels can serve these sizes.
    fn checked(self) -> Result<Self, FieldError> {
        let q_dim = self.heads.saturating_mul(self.head_dim);
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let expected = "a divisor of num_attention_heads";
            return Err(read::invalid("num_key_value_heads", self.kv_heads, expected));
        }
        if let Some(Experts { count, per_token, .. }) = self.experts
            && per_token > count
        {
            let (field, expected) = ("num_experts_per_tok", "at most the number of experts");
            return Err(read::invalid(field, per_token, expected));
        }
        let dense = self.experts.iter().flat_map(|experts| experts.dense.iter().flatten());
        let multiples = [
            ("hidden_size", self.hidden),
            ("head_dim", self.head_dim),
            ("head_dim * partial_rotary_factor", self.rope.width),
            ("intermediate_size", self.ffn),
            ("num_attention_heads * head_dim", q_dim),
        ];
        let multiples = multiples.into_iter().chain(dense.map(|&ffn| ("intermediate_size", ffn)));
        match multiples.into_iter().find(|&(_, found)| found == 0 || found % 32 != 0) {
            Some((field, found)) => Err(read::unsupported(field, found, "multiples of 32")),
            None => Ok(self),
        }
    }

    /// Width of the query heads together.
    #[must_use]
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the key heads together, and of the value heads.
    #[must_use]
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Positions that layer `layer` sees, where it has a window.
    #[must_use]
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.window.as_ref().filter(|window| window.layers[layer]).map(|window| window.positions)
    }

    /// Whether layer `layer` turns by [`window_rope`](Self::window_rope).
    #[must_use]
    pub fn has_window_rope(&self, layer: usize) -> bool {
        self.window_rope.is_some() && self.window_of(layer).is_some()
    }
}
