//! The engine against candle: a plain `f32` forward pass of the same random model, written with candle's tensors.
use crate::common::{Named, Rng, engine, generate, model, spec, tensors, with_heads};
use candle_core::{D, Device, Tensor};
use pointsman_engine::{ComputePool, ModelSpec, Precision, Rope};
use safetensors::Dtype;

struct Oracle<'a> {
    spec: &'a ModelSpec,
    tensors: &'a [Named],
}

type Result<T> = candle_core::Result<T>;

impl Oracle<'_> {
    fn get(&self, name: &str) -> Result<Tensor> {
        let found = self.tensors.iter().find(|t| t.name == name).expect(name);
        Tensor::from_vec(found.values.clone(), found.shape.clone(), &Device::Cpu)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(mean + f64::from(self.spec.norm_eps))?.sqrt()?)?;
        x.broadcast_mul(&self.get(name)?)
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.matmul(&self.get(name)?.t()?)
    }

    /// `[t, heads * d]` to rotated `[heads, t, d]`.
    fn heads(&self, x: &Tensor, heads: usize, rotate: bool) -> Result<Tensor> {
        let (t, d) = (x.dim(0)?, self.spec.head_dim);
        let x = x.reshape((t, heads, d))?.transpose(0, 1)?.contiguous()?;
        if !rotate {
            return Ok(x);
        }
        let angle = |i: usize| (i / (d / 2)) as f64 / self.spec.rope.theta.powf(2.0 * (i % (d / 2)) as f64 / d as f64);
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..t * d / 2).map(|i| f(angle(i)) as f32).collect();
            Tensor::from_vec(values, (t, d / 2), &Device::Cpu)
        };
        let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
        let (a, b) = (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?);
        let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[low, high], 2)
    }

    fn attention(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        let (t, spec) = (x.dim(0)?, self.spec);
        let q = self.heads(&self.linear(x, &name("q_proj"))?, spec.heads, true)?;
        let k = self.heads(&self.linear(x, &name("k_proj"))?, spec.kv_heads, true)?;
        let v = self.heads(&self.linear(x, &name("v_proj"))?, spec.kv_heads, false)?;
        let group = spec.heads / spec.kv_heads;
        let index: Vec<u32> = (0..spec.heads).map(|head| (head / group) as u32).collect();
        let index = Tensor::from_vec(index, spec.heads, &Device::Cpu)?;
        let (k, v) = (k.index_select(&index, 0)?, v.index_select(&index, 0)?);
        let mask: Vec<f32> = (0..t * t).map(|i| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (t, t), &Device::Cpu)?;
        let scores =
            (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (spec.head_dim as f64).sqrt())?.broadcast_add(&mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(2)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(2)?)?;
        let mixed = weights.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape((t, spec.q_dim()))?;
        self.linear(&mixed, &name("o_proj"))
    }

    /// Logits of the last token.
    fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let embedding = self.get("model.embed_tokens.weight")?;
        let mut x = embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
        for layer in 0..self.spec.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            x = (&x + self.attention(&self.norm(&x, &name("input_layernorm"))?, layer)?)?;
            let normed = self.norm(&x, &name("post_attention_layernorm"))?;
            let gate = self.linear(&normed, &name("mlp.gate_proj"))?.silu()?;
            let up = self.linear(&normed, &name("mlp.up_proj"))?;
            x = (&x + self.linear(&(gate * up)?, &name("mlp.down_proj"))?)?;
        }
        let last = self.norm(&x.narrow(0, tokens.len() - 1, 1)?, "model.norm.weight")?;
        let head = if self.spec.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        self.linear(&last, head)?.squeeze(0)?.to_vec1()
    }
}

fn engine_logits(spec: &ModelSpec, dtype: Dtype, precision: Precision, tokens: &[u32]) -> Vec<f32> {
    let model = model(spec, dtype, precision, 7);
    let (_, logits) = generate(&mut engine(&model, &ComputePool::start(2).unwrap()), tokens, 1_000, 1);
    logits[0].iter().map(|&bits| f32::from_bits(bits)).collect()
}

/// Specifications that differ in what may go wrong: grouping, head width, tying, width of the vocabulary.
fn specs() -> Vec<ModelSpec> {
    vec![
        spec(),
        ModelSpec { tied: false, kv_heads: 4, vocab: 64, ..spec() },
        ModelSpec { rope: Rope { theta: 500_000.0, ..with_heads(3, 1, 64).rope }, ..with_heads(3, 1, 64) },
        ModelSpec { layers: 1, ..with_heads(10, 2, 32) },
        ModelSpec { layers: 1, ..with_heads(2, 2, 96) },
    ]
}

#[test]
fn logits_are_those_of_candle() {
    for spec in specs() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for len in [1, 2, 16, 17, 100] {
                let tokens = Rng(len as u64).tokens(len, spec.vocab);
                let tensors = tensors(&spec, dtype, 7);
                let expect = Oracle { spec: &spec, tensors: &tensors }.logits(&tokens).unwrap();
                let found = engine_logits(&spec, dtype, Precision::F16, &tokens);
                assert_eq!(found.len(), expect.len());
                let worst = found.iter().zip(&expect).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-4, "{spec:?} {dtype:?} {len} tokens: off by {worst}");
            }
        }
    }
}

#[test]
fn eight_bits_cost_little() {
    for spec in specs() {
        let tokens = Rng(3).tokens(50, spec.vocab);
        let tensors = tensors(&spec, Dtype::F16, 7);
        let expect = Oracle { spec: &spec, tensors: &tensors }.logits(&tokens).unwrap();
        let found = engine_logits(&spec, Dtype::F16, Precision::Q8_0, &tokens);
        let error: f32 = found.iter().zip(&expect).map(|(a, b)| (a - b).powi(2)).sum();
        let size: f32 = expect.iter().map(|x| x * x).sum();
        // Two roundings to 8 bits per product, each about half a percent, over thirteen products in a row.
        assert!((error / size).sqrt() < 0.05, "{spec:?}: relative error {}", (error / size).sqrt());
    }
}
