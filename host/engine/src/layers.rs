//! Where a checkpoint keeps the tensors that it may hold whole or in parts: the one place that asks for [`Naming`].

use crate::load::{Elements, LoadError, Weights};
use crate::spec::{ModelSpec, Naming};

impl Weights {
    /// Rows of q, then k, then v of a layer, in one tensor or three.
    pub(crate) fn qkv(&self, spec: &ModelSpec, layer: usize) -> Result<Vec<Elements<'_>>, LoadError> {
        let get = |part: &str, n| self.get(&format!("model.layers.{layer}.self_attn.{part}.weight"), &[n, spec.hidden]);
        match spec.naming {
            Naming::Packed => Ok(vec![get("qkv_proj", spec.q_dim() + 2 * spec.kv_dim())?]),
            Naming::Split | Naming::Mixtral => qkv_parts(spec).into_iter().map(|(part, n)| get(part, n)).collect(),
        }
    }

    /// Biases of the same.
    pub(crate) fn qkv_bias(&self, spec: &ModelSpec, layer: usize) -> Result<Vec<Elements<'_>>, LoadError> {
        let get = |(part, n)| self.get(&format!("model.layers.{layer}.self_attn.{part}.bias"), &[n]);
        qkv_parts(spec).into_iter().map(get).collect()
    }

    /// Rows of gate and of up of a layer's dense half, `ffn` each.
    pub(crate) fn gate_up(&self, spec: &ModelSpec, layer: usize, ffn: usize) -> Result<[Elements<'_>; 2], LoadError> {
        let get = |part: &str, n| self.get(&format!("model.layers.{layer}.mlp.{part}.weight"), &[n, spec.hidden]);
        match spec.naming {
            Naming::Packed => Ok(get("gate_up_proj", 2 * ffn)?.split_at(ffn * spec.hidden).into()),
            Naming::Split | Naming::Mixtral => Ok([get("gate_proj", ffn)?, get("up_proj", ffn)?]),
        }
    }
}

fn qkv_parts(spec: &ModelSpec) -> [(&'static str, usize); 3] {
    [("q_proj", spec.q_dim()), ("k_proj", spec.kv_dim()), ("v_proj", spec.kv_dim())]
}
