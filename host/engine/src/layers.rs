//! Where a checkpoint keeps the tensors that it may hold whole or in parts: the one place that asks for [`Naming`].

use crate::load::{Elements, LoadError, Weights};
use crate::spec::{Experts, ModelSpec, Naming};

/// The matrices of a feed-forward half.
#[derive(Debug)]
pub(crate) struct GatedParts<'a> {
    /// `ffn` rows each.
    pub(crate) gate_up: [Elements<'a>; 2],
    pub(crate) down: Elements<'a>,
}

impl Weights {
    /// Rows of q, then k, then v of a layer, in one tensor or more.
    pub(crate) fn qkv(&self, spec: &ModelSpec, layer: usize) -> Result<Vec<Elements<'_>>, LoadError> {
        self.projections(spec, layer, "weight", &[spec.hidden])
    }

    /// Biases of the same.
    pub(crate) fn qkv_bias(&self, spec: &ModelSpec, layer: usize) -> Result<Vec<Elements<'_>>, LoadError> {
        self.projections(spec, layer, "bias", &[])
    }

    /// Matrices (`width` is their other size) or vectors.
    fn projections(
        &self,
        spec: &ModelSpec,
        layer: usize,
        suffix: &str,
        width: &[usize],
    ) -> Result<Vec<Elements<'_>>, LoadError> {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.{suffix}");
        let get = |part: &str, n: usize| {
            let found = self.get(&name(part), &[&[n], width].concat())?;
            // Rows of a vector are single values, and a block of quantised ones cannot be cut.
            Ok::<_, LoadError>(if width.is_empty() { found.widened() } else { found })
        };
        let k = width.first().copied().unwrap_or(1);
        let (q_dim, kv_dim) = (spec.q_dim(), spec.kv_dim());
        let whole = match spec.naming {
            Naming::Packed => true,
            Naming::Gguf { .. } => self.has(&name("qkv_proj")),
            Naming::Split | Naming::Mixtral => false,
        };
        let mut parts = match whole {
            true => {
                let (q, rest) = get("qkv_proj", q_dim + 2 * kv_dim)?.split_at(q_dim * k);
                let (key, value) = rest.split_at(kv_dim * k);
                vec![q, key, value]
            }
            false => vec![get("q_proj", q_dim)?, get("k_proj", kv_dim)?, get("v_proj", kv_dim)?],
        };
        if let Naming::Gguf { interleaved: true } = spec.naming {
            parts[..2].iter_mut().for_each(|part| *part = part.reordered(k, |row| interleaved(row, spec.head_dim)));
        }
        Ok(parts)
    }

    /// A layer's dense feed-forward half of width `ffn`.
    pub(crate) fn dense(&self, spec: &ModelSpec, layer: usize, ffn: usize) -> Result<GatedParts<'_>, LoadError> {
        let name = |part: &str| format!("model.layers.{layer}.mlp.{part}.weight");
        let get = |part: &str, shape: [usize; 2]| self.get(&name(part), &shape);
        let whole = match spec.naming {
            Naming::Packed => true,
            Naming::Gguf { .. } => !self.has(&name("gate_proj")),
            Naming::Split | Naming::Mixtral => false,
        };
        let gate_up = match whole {
            true => get("gate_up_proj", [2 * ffn, spec.hidden])?.split_at(ffn * spec.hidden).into(),
            false => [get("gate_proj", [ffn, spec.hidden])?, get("up_proj", [ffn, spec.hidden])?],
        };
        Ok(GatedParts { gate_up, down: get("down_proj", [spec.hidden, ffn])? })
    }

    /// A layer's router: a row for each expert.
    pub(crate) fn router(&self, spec: &ModelSpec, layer: usize, count: usize) -> Result<Elements<'_>, LoadError> {
        let block = match spec.naming {
            Naming::Mixtral => "block_sparse_moe",
            Naming::Split | Naming::Packed | Naming::Gguf { .. } => "mlp",
        };
        self.get(&format!("model.layers.{layer}.{block}.gate.weight"), &[count, spec.hidden])
    }

    /// A layer's experts, in order.
    pub(crate) fn experts(
        &self,
        spec: &ModelSpec,
        layer: usize,
        experts: &Experts,
    ) -> Result<Vec<GatedParts<'_>>, LoadError> {
        let ModelSpec { hidden, ffn, .. } = *spec;
        let (block, [gate, up, down]) = match spec.naming {
            Naming::Gguf { .. } => return self.joined_experts(spec, layer, experts.count),
            Naming::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
            Naming::Split | Naming::Packed => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        };
        let expert = |i: usize| {
            let get = |part: &str, shape: [usize; 2]| {
                self.get(&format!("model.layers.{layer}.{block}.experts.{i}.{part}.weight"), &shape)
            };
            let gate_up = [get(gate, [ffn, hidden])?, get(up, [ffn, hidden])?];
            Ok(GatedParts { gate_up, down: get(down, [hidden, ffn])? })
        };
        (0..experts.count).map(expert).collect()
    }

    /// The same from one tensor for each matrix of all experts.
    fn joined_experts(&self, spec: &ModelSpec, layer: usize, count: usize) -> Result<Vec<GatedParts<'_>>, LoadError> {
        let ModelSpec { hidden, ffn, .. } = *spec;
        let get = |part: &str, n: usize, k: usize| {
            let all = self.get(&format!("model.layers.{layer}.mlp.experts.{part}.weight"), &[count, n, k])?;
            Ok::<_, LoadError>(all.chunks(n * k))
        };
        let (gate, up) = (get("gate_proj", ffn, hidden)?, get("up_proj", ffn, hidden)?);
        let parts = gate.into_iter().zip(up).zip(get("down_proj", hidden, ffn)?);
        Ok(parts.map(|((gate, up), down)| GatedParts { gate_up: [gate, up], down }).collect())
    }
}

/// Where row `row` of q or k lies in a file whose heads alternate between their two halves.
fn interleaved(row: usize, head_dim: usize) -> usize {
    let (head, at) = (row / head_dim, row % head_dim);
    head * head_dim + at % (head_dim / 2) * 2 + at / (head_dim / 2)
}
