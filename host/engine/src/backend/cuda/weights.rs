//! Weights from files into a device's memory, in the layout that its kernels read.
//!
//! A tensor is converted in pieces of a few MiB, so that a model of any size passes through little host memory. Rows of q, k
//! and v are put one below the other, and gate and up alternate row by row: the kernel that multiplies them writes one
//! number for each pair.

use super::device::Device;
use super::engine::CudaError;
use super::layout::{Buffer, LayerPart, Owner, Sizes};
use crate::layers::GatedParts;
use crate::load::{Elements, Kind, Weights};

/// Bytes that are converted at once.
const PIECE: usize = 8 << 20;

/// Where a model's numbers come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Files.
    Files(&'a Weights),
    /// A generator, from this seed: for measuring models whose files are not at hand. They are scaled so that nothing overflows.
    Random(u64),
}

/// Where the parts of a model go.
pub(crate) struct Packer<'a> {
    pub(crate) sizes: &'a Sizes,
    pub(crate) device: &'a mut dyn Device,
    pub(crate) addresses: &'a [u64],
    pub(crate) piece: Vec<u8>,
}

impl Packer<'_> {
    /// Everything; `progress` is told the bytes done after each buffer.
    pub(crate) fn pack(&mut self, source: Source<'_>, progress: &mut dyn FnMut(u64)) -> Result<(), CudaError> {
        match source {
            Source::Files(weights) => self.files(weights, progress)?,
            Source::Random(seed) => self.random(seed, progress)?,
        }
        self.rope()
    }

    fn files(&mut self, weights: &Weights, progress: &mut dyn FnMut(u64)) -> Result<(), CudaError> {
        let (vocab, hidden) = (self.sizes.spec.vocab, self.sizes.spec.hidden);
        let mut done = self.join(Buffer::Embedding, &[weights.get("model.embed_tokens.weight", &[vocab, hidden])?])?;
        done += self.join(Buffer::FinalNorm, &[weights.get("model.norm.weight", &[hidden])?])?;
        if !self.sizes.spec.tied {
            done += self.join(Buffer::Head, &[weights.get("lm_head.weight", &[vocab, hidden])?])?;
        }
        for layer in 0..self.sizes.spec.layers {
            done += self.attention(weights, layer)? + self.ffn(weights, layer)?;
            progress(done);
        }
        Ok(())
    }

    fn attention(&mut self, weights: &Weights, layer: usize) -> Result<u64, CudaError> {
        let spec = &self.sizes.spec;
        let (hidden, head_dim, q_dim) = (spec.hidden, spec.head_dim, spec.q_dim());
        let (qkv_bias, out_bias, qk_norm) = (spec.qkv_bias, spec.out_bias, spec.qk_norm);
        let get = |part: &str, shape: &[usize]| weights.get(&format!("model.layers.{layer}.{part}"), shape);
        let part = |part| Buffer::Layer(layer as u16, part);
        let mut done = self.join(part(LayerPart::AttentionNorm), &[get("input_layernorm.weight", &[hidden])?])?;
        let (qkv, biases) = (weights.qkv(spec, layer)?, if qkv_bias { weights.qkv_bias(spec, layer)? } else { vec![] });
        done += self.join(part(LayerPart::Qkv), &qkv)?;
        if qkv_bias {
            done += self.join(part(LayerPart::QkvBias), &biases)?;
        }
        if qk_norm {
            done += self.join(part(LayerPart::QNorm), &[get("self_attn.q_norm.weight", &[head_dim])?])?;
            done += self.join(part(LayerPart::KNorm), &[get("self_attn.k_norm.weight", &[head_dim])?])?;
        }
        done += self.join(part(LayerPart::Out), &[get("self_attn.o_proj.weight", &[hidden, q_dim])?])?;
        if out_bias {
            done += self.join(part(LayerPart::OutBias), &[get("self_attn.o_proj.bias", &[hidden])?])?;
        }
        Ok(done)
    }

    fn ffn(&mut self, weights: &Weights, layer: usize) -> Result<u64, CudaError> {
        let (hidden, ffn) = (self.sizes.spec.hidden, self.sizes.spec.ffn);
        let get = |part: &str, shape: &[usize]| weights.get(&format!("model.layers.{layer}.{part}.weight"), shape);
        let part = |part| Buffer::Layer(layer as u16, part);
        let mut done = self.join(part(LayerPart::FfnNorm), &[get("post_attention_layernorm", &[hidden])?])?;
        let GatedParts { gate_up: [gate, up], down } = weights.dense(&self.sizes.spec, layer, ffn)?;
        done += self.alternate(part(LayerPart::GateUp), &gate, &up)?;
        Ok(done + self.join(part(LayerPart::Down), &[down])?)
    }

    /// Norms of ones and matrices of small numbers around zero: one piece of them, again and again.
    fn random(&mut self, seed: u64, progress: &mut dyn FnMut(u64)) -> Result<(), CudaError> {
        let element = self.sizes.element;
        let mut random = seed;
        let number = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((random >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * 0.04
        };
        let numbers: Vec<f32> = std::iter::repeat_with(number).take(PIECE / element.bytes()).collect();
        let encoded = |numbers: &[f32]| -> Vec<u8> {
            let quads: Vec<[u8; 4]> = numbers.iter().map(|x| x.to_le_bytes()).collect();
            let mut bytes = Vec::with_capacity(quads.len() * element.bytes());
            element.append(&Elements::new(Kind::F32, quads.as_flattened()), 0..quads.len(), &mut bytes);
            bytes
        };
        let (matrix, ones) = (encoded(&numbers), encoded(&vec![1.0; self.sizes.spec.hidden]));
        let mut done = 0;
        for piece in self.sizes.pieces() {
            let norm = matches!(
                piece.buffer,
                Buffer::FinalNorm
                    | Buffer::Layer(
                        _,
                        LayerPart::AttentionNorm | LayerPart::FfnNorm | LayerPart::QNorm | LayerPart::KNorm
                    )
            );
            if piece.owner != Owner::Weights || piece.buffer == Buffer::Rope {
                continue;
            }
            let from = if norm { &ones } else { &matrix };
            let (to, mut at) = (self.addresses[piece.buffer.index()], 0);
            while at < piece.bytes {
                let n = (piece.bytes - at).min(from.len() as u64);
                self.device.upload(to + at, &from[..n as usize])?;
                at += n;
            }
            done += piece.bytes;
            progress(done);
        }
        Ok(())
    }

    /// Tensors one after the other.
    fn join(&mut self, buffer: Buffer, parts: &[Elements<'_>]) -> Result<u64, CudaError> {
        let element = self.sizes.element;
        let step = PIECE / element.bytes();
        let mut at = 0;
        for part in parts {
            for start in (0..part.len()).step_by(step) {
                self.piece.clear();
                element.append(part, start..part.len().min(start + step), &mut self.piece);
                at = self.put(buffer, at)?;
            }
        }
        Ok(at)
    }

    /// Two tensors of one shape, row by row in turn.
    fn alternate(&mut self, buffer: Buffer, even: &Elements<'_>, odd: &Elements<'_>) -> Result<u64, CudaError> {
        let (element, width) = (self.sizes.element, self.sizes.spec.hidden);
        let rows_at_once = (PIECE / (2 * width * element.bytes())).max(1);
        let (rows, mut at) = (even.len() / width, 0);
        for first in (0..rows).step_by(rows_at_once) {
            self.piece.clear();
            for row in first..rows.min(first + rows_at_once) {
                element.append(even, row * width..(row + 1) * width, &mut self.piece);
                element.append(odd, row * width..(row + 1) * width, &mut self.piece);
            }
            at = self.put(buffer, at)?;
        }
        Ok(at)
    }

    /// Cosine and sine by position, made in `f64` as the CPU backend makes them.
    fn rope(&mut self) -> Result<(), CudaError> {
        let frequencies = self.sizes.spec.rope.frequencies();
        let mut at = 0;
        for position in 0..self.sizes.config.context_tokens {
            self.piece.clear();
            for frequency in &frequencies {
                let angle = position as f64 * frequency;
                self.piece.extend((angle.cos() as f32).to_le_bytes());
                self.piece.extend((angle.sin() as f32).to_le_bytes());
            }
            at = self.put(Buffer::Rope, at)?;
        }
        Ok(())
    }

    /// Copies the piece to `at` bytes into a buffer; where the next one goes.
    fn put(&mut self, buffer: Buffer, at: u64) -> Result<u64, CudaError> {
        self.device.upload(self.addresses[buffer.index()] + at, &self.piece)?;
        Ok(at + self.piece.len() as u64)
    }
}
