//! Weights from files into a device's memory, in the layout that its kernels read.
//!
//! A tensor is converted in pieces of a few MiB, so that a model of any size passes through little host memory. Rows of q, k
//! and v are put one below the other, and gate and up alternate row by row: the kernel that multiplies them writes one
//! number for each pair. Matrices may be quantised on the way, to numbers of 8 bits and scales behind them.

use std::ops::Range;
use std::slice;

use super::device::{Device, DeviceError, fill};
use super::element::{Element, Form};
use super::engine::CudaError;
use super::launch::Kernel;
use super::layout::{Buffer, LayerPart, Owner, Sizes};
use crate::backend::cpu::{Precision, Progress};
use crate::load::{Elements, Kind, LoadError, Weights, quantise_fp8, quantise_q8_0};
use crate::spec::Rope;

/// Bytes that are converted at once.
const PIECE: usize = 8 << 20;

/// Where each of sixteen numbers of a row of 8-bit numbers is kept: so that a word is one thread's part of a matrix unit's sixteen.
const PLACES: [usize; 16] = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15];

/// The kernels widen an e4m3 number to this part of it; its scale is stored so much larger.
const FP8_WIDENED: f32 = 256.0;

/// Where a model's numbers come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Files.
    Files(&'a Weights),
    /// A generator, from this seed: for measuring models whose files are not at hand. They are scaled so that nothing overflows. The
    /// KV pool has random numbers as well: zeros take less power to read, and less power lets a GPU run faster.
    Random(u64),
}

/// Where the parts of a model go.
pub(crate) struct Packer<'a> {
    sizes: &'a Sizes,
    device: &'a mut dyn Device,
    addresses: &'a [u64],
    piece: Piece,
}

/// What is converted and not copied yet.
#[derive(Debug, Default)]
struct Piece {
    numbers: Vec<u8>,
    /// Of 8-bit matrices.
    scales: Vec<u8>,
}

impl<'a> Packer<'a> {
    pub(crate) fn new(sizes: &'a Sizes, device: &'a mut dyn Device, addresses: &'a [u64]) -> Self {
        Self { sizes, device, addresses, piece: Piece::default() }
    }

    /// Everything; `progress` is told the bytes done after each layer, and ends it by a no.
    pub(crate) fn pack(&mut self, source: Source<'_>, progress: &mut Progress<'_>) -> Result<(), CudaError> {
        match source {
            Source::Files(weights) => self.files(weights, progress)?,
            Source::Random(seed) => self.random(seed, progress)?,
        }
        let spec = &self.sizes.spec;
        self.rope(Buffer::Rope, &spec.rope)?;
        spec.window_rope.as_ref().map_or(Ok(()), |rope| self.rope(Buffer::WindowRope, rope))
    }

    fn files(&mut self, weights: &Weights, progress: &mut Progress<'_>) -> Result<(), CudaError> {
        let (vocab, hidden, tied) = (self.sizes.spec.vocab, self.sizes.spec.hidden, self.sizes.spec.tied);
        let embedding = weights.get("model.embed_tokens.weight", &[vocab, hidden])?;
        let mut done = match tied {
            true => self.matrix(Buffer::Embedding, &[embedding], hidden)?,
            false => self.vector(Buffer::Embedding, &[embedding])?,
        };
        done += self.vector(Buffer::FinalNorm, &[weights.get("model.norm.weight", &[hidden])?])?;
        if !tied {
            let head = weights.get("lm_head.weight", &[vocab, hidden])?;
            done += self.matrix(Buffer::Head, &[head], hidden)?;
        }
        for layer in 0..self.sizes.spec.layers {
            done += self.attention(weights, layer)? + self.ffn(weights, layer)?;
            if !progress(done) {
                return Err(LoadError::Stopped.into());
            }
        }
        Ok(())
    }

    fn attention(&mut self, weights: &Weights, layer: usize) -> Result<u64, CudaError> {
        let spec = &self.sizes.spec;
        let (hidden, head_dim, q_dim) = (spec.hidden, spec.head_dim, spec.q_dim());
        let (qkv_bias, out_bias, qk_norm) = (spec.qkv_bias, spec.out_bias, spec.qk_norm);
        let get = |part: &str, shape: &[usize]| weights.get(&format!("model.layers.{layer}.{part}"), shape);
        let part = |part| Buffer::Layer(layer as u16, part);
        let mut done = self.vector(part(LayerPart::AttentionNorm), &[get("input_layernorm.weight", &[hidden])?])?;
        let (qkv, biases) = (weights.qkv(spec, layer)?, if qkv_bias { weights.qkv_bias(spec, layer)? } else { vec![] });
        done += self.matrix(part(LayerPart::Qkv), &qkv, hidden)?;
        if qkv_bias {
            done += self.vector(part(LayerPart::QkvBias), &biases)?;
        }
        if qk_norm {
            done += self.vector(part(LayerPart::QNorm), &[get("self_attn.q_norm.weight", &[head_dim])?])?;
            done += self.vector(part(LayerPart::KNorm), &[get("self_attn.k_norm.weight", &[head_dim])?])?;
        }
        let out = get("self_attn.o_proj.weight", &[hidden, q_dim])?;
        done += self.matrix(part(LayerPart::Out), &[out], q_dim)?;
        if out_bias {
            done += self.vector(part(LayerPart::OutBias), &[get("self_attn.o_proj.bias", &[hidden])?])?;
        }
        Ok(done)
    }

    fn ffn(&mut self, weights: &Weights, layer: usize) -> Result<u64, CudaError> {
        let (hidden, ffn) = (self.sizes.spec.hidden, self.sizes.ffn_of(layer));
        let get = |part: &str, shape: &[usize]| weights.get(&format!("model.layers.{layer}.{part}.weight"), shape);
        let part = |part| Buffer::Layer(layer as u16, part);
        // The same name is of another norm in models that have two more.
        let (norm, after) = match self.sizes.spec.post_norms {
            true => ("pre_feedforward_layernorm", true),
            false => ("post_attention_layernorm", false),
        };
        let mut done = self.vector(part(LayerPart::FfnNorm), &[get(norm, &[hidden])?])?;
        if after {
            let [attention, ffn] = ["post_attention_layernorm", "post_feedforward_layernorm"];
            done += self.vector(part(LayerPart::PostAttentionNorm), &[get(attention, &[hidden])?])?;
            done += self.vector(part(LayerPart::PostFfnNorm), &[get(ffn, &[hidden])?])?;
        }
        let halves = match self.sizes.experts_of(layer) {
            Some(experts) => {
                let router = weights.router(&self.sizes.spec, layer, experts.count)?;
                done += self.numbers(part(LayerPart::Router), Element::F32, &[router])?;
                weights.experts(&self.sizes.spec, layer, experts)?
            }
            None => vec![weights.dense(&self.sizes.spec, layer, ffn)?],
        };
        let gates: Vec<&[Elements<'_>]> = halves.iter().map(|half| half.gate_up.as_slice()).collect();
        done += self.joined(part(LayerPart::GateUp), &gates, hidden)?;
        let downs: Vec<&[Elements<'_>]> = halves.iter().map(|half| slice::from_ref(&half.down)).collect();
        Ok(done + self.joined(part(LayerPart::Down), &downs, ffn)?)
    }

    /// Norms of ones and matrices of small numbers around zero: one piece of them, again and again.
    fn random(&mut self, seed: u64, progress: &mut Progress<'_>) -> Result<(), CudaError> {
        let mut random = seed;
        let number = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (((random >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * 0.04).to_le_bytes()
        };
        let numbers: Vec<[u8; 4]> = std::iter::repeat_with(number).take(PIECE / 4).collect();
        let ones = vec![1.0f32.to_le_bytes(); self.sizes.spec.hidden];
        let (numbers, ones) = [&numbers, &ones].map(|of| Elements::new(Kind::F32, of.as_flattened())).into();
        let plain = |element: Element, numbers: &Elements<'_>| {
            let mut piece = Piece::default();
            element.append(numbers, 0..numbers.len(), &mut piece.numbers);
            piece
        };
        // Rows of 32 numbers: the scales of rows of any length are as many and more.
        let mut quantised = Piece::default();
        quantised.rows(self.sizes.form, slice::from_ref(&numbers), 32)?;
        let element = self.sizes.form.element;
        let (matrix, ones, router) = (plain(element, &numbers), plain(element, &ones), plain(Element::F32, &numbers));
        let mut done = 0;
        for laid in self.sizes.pieces() {
            if laid.owner != Owner::Weights || matches!(laid.buffer, Buffer::Rope | Buffer::WindowRope) {
                continue;
            }
            let from = match laid.buffer {
                Buffer::FinalNorm => &ones,
                Buffer::Layer(
                    _,
                    LayerPart::AttentionNorm | LayerPart::FfnNorm | LayerPart::QNorm | LayerPart::KNorm,
                )
                | Buffer::Layer(_, LayerPart::PostAttentionNorm | LayerPart::PostFfnNorm) => &ones,
                Buffer::Layer(_, LayerPart::QkvBias | LayerPart::OutBias) => &matrix,
                Buffer::Layer(_, LayerPart::Router) => &router,
                Buffer::Embedding if !self.sizes.spec.tied => &matrix,
                _ => &quantised,
            };
            self.repeat(laid.buffer, 0..laid.numbers, &from.numbers)?;
            self.repeat(laid.buffer, laid.numbers..laid.bytes, &from.scales)?;
            done += laid.bytes;
            if !progress(done) {
                return Err(LoadError::Stopped.into());
            }
        }
        Ok(self.random_pages()?)
    }

    /// Keys and values between a half and one, of either sign.
    fn random_pages(&mut self) -> Result<(), DeviceError> {
        // No kernel of a step has it.
        const NUMBER: usize = Kernel::ALL.len() + 1;
        self.device.load(&[(NUMBER, "fill_words".to_owned())])?;
        let word = match self.sizes.form.element {
            Element::F32 => [0x3f00_0000, 0x807f_ffff],
            Element::F16 => [0x3800_3800, 0x83ff_83ff],
            Element::Bf16 => [0x3f00_3f00, 0x807f_807f],
        };
        let pools = self.sizes.pieces().into_iter().filter(|piece| piece.owner == Owner::Kv);
        pools
            .into_iter()
            .try_for_each(|pool| fill(self.device, NUMBER, (self.addresses[pool.buffer.index()], pool.bytes), word))
    }

    /// Fills a range of a buffer with a pattern.
    fn repeat(&mut self, buffer: Buffer, range: Range<u64>, pattern: &[u8]) -> Result<(), CudaError> {
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(pattern.len() as u64);
            self.device.upload(self.addresses[buffer.index()] + at, &pattern[..n as usize])?;
            at += n;
        }
        Ok(())
    }

    /// Tensors one after the other, in the element type; the bytes of them.
    fn vector(&mut self, buffer: Buffer, parts: &[Elements<'_>]) -> Result<u64, CudaError> {
        self.numbers(buffer, self.sizes.form.element, parts)
    }

    /// The same, in this type.
    fn numbers(&mut self, buffer: Buffer, element: Element, parts: &[Elements<'_>]) -> Result<u64, CudaError> {
        let step = PIECE / element.bytes();
        let mut at = 0;
        for part in parts {
            for start in (0..part.len()).step_by(step) {
                element.append(part, start..part.len().min(start + step), &mut self.piece.numbers);
                at = self.put(buffer, at)?;
            }
        }
        Ok(at)
    }

    /// Parts of width `k`, one below the other, as the form keeps matrices; the bytes of their numbers and scales.
    fn matrix(&mut self, buffer: Buffer, parts: &[Elements<'_>], k: usize) -> Result<u64, CudaError> {
        self.joined(buffer, &parts.chunks(1).collect::<Vec<_>>(), k)
    }

    /// The same of groups of parts of one height, row by row in turn; one group below the other.
    fn joined(&mut self, buffer: Buffer, groups: &[&[Elements<'_>]], k: usize) -> Result<u64, CudaError> {
        let form = self.sizes.form;
        let n: usize = groups.iter().copied().flatten().map(|part| part.len() / k).sum();
        // Scales follow the numbers of all rows.
        let (mut at, mut scales_at) = (0, form.numbers_bytes(n, k));
        for group in groups {
            let rows = group[0].len() / k;
            let at_once = (PIECE / (group.len() * k * form.element.bytes())).max(1);
            for first in (0..rows).step_by(at_once) {
                let range = first * k..rows.min(first + at_once) * k;
                let slices: Vec<Elements<'_>> = group.iter().map(|part| part.slice(range.clone())).collect();
                self.piece.rows(form, &slices, k)?;
                scales_at = self.put_scales(buffer, scales_at)?;
                at = self.put(buffer, at)?;
            }
        }
        Ok(scales_at.max(at))
    }

    /// Cosine and sine by position, made in `f64` as the CPU backend makes them.
    fn rope(&mut self, buffer: Buffer, rope: &Rope) -> Result<(), CudaError> {
        let frequencies = rope.frequencies();
        let mut at = 0;
        for position in 0..self.sizes.config.context_tokens {
            for frequency in &frequencies {
                let angle = position as f64 * frequency;
                self.piece.numbers.extend(((rope.magnitude * angle.cos()) as f32).to_le_bytes());
                self.piece.numbers.extend(((rope.magnitude * angle.sin()) as f32).to_le_bytes());
            }
            if self.piece.numbers.len() >= PIECE {
                at = self.put(buffer, at)?;
            }
        }
        self.put(buffer, at).map(drop)
    }

    /// Copies the numbers to `at` bytes into a buffer; where the next ones go.
    fn put(&mut self, buffer: Buffer, at: u64) -> Result<u64, CudaError> {
        self.device.upload(self.addresses[buffer.index()] + at, &self.piece.numbers)?;
        let end = at + self.piece.numbers.len() as u64;
        self.piece.numbers.clear();
        Ok(end)
    }

    /// The same for scales.
    fn put_scales(&mut self, buffer: Buffer, at: u64) -> Result<u64, CudaError> {
        if self.piece.scales.is_empty() {
            return Ok(at);
        }
        self.device.upload(self.addresses[buffer.index()] + at, &self.piece.scales)?;
        let end = at + self.piece.scales.len() as u64;
        self.piece.scales.clear();
        Ok(end)
    }
}

// === impl Piece ===

impl Piece {
    /// Adds the rows of width `k` of parts of one height, in turn.
    fn rows(&mut self, form: Form, parts: &[Elements<'_>], k: usize) -> Result<(), LoadError> {
        let n = parts[0].len() / k;
        match form.precision {
            Precision::F16 => {
                for (row, part) in turns(n, parts) {
                    form.element.append(part, row * k..(row + 1) * k, &mut self.numbers);
                }
            }
            Precision::Q8_0 => {
                // A file that has such blocks keeps them.
                let quantised = parts.iter().map(|part| match part.kind {
                    Kind::Q8_0 => Ok(part.slice(0..part.len())),
                    _ => quantise_q8_0(part, k),
                });
                let quantised: Vec<Elements<'_>> = quantised.collect::<Result<_, _>>()?;
                for (row, part) in turns(n, &quantised) {
                    for block in &part.blocks::<34>()[row * (k / 32)..][..k / 32] {
                        let (scale, quants) = block.split_at(2);
                        self.scales.extend(scale);
                        // Kernels subtract the 128 again: a byte without sign is a float's last bits.
                        self.sixteens(quants, 0x80);
                    }
                }
            }
            Precision::Fp8 => {
                let quantised: Vec<_> = parts.iter().map(|part| quantise_fp8(part, k)).collect();
                for (row, rows) in turns(n, &quantised) {
                    self.scales.extend((rows[row].scale * FP8_WIDENED).to_le_bytes());
                    self.sixteens(&rows[row].codes, 0);
                }
            }
        }
        Ok(())
    }

    /// Adds 8-bit numbers with these bits turned over, each sixteen in the kernels' order.
    fn sixteens(&mut self, numbers: &[u8], turned: u8) {
        for sixteen in numbers.as_chunks::<16>().0 {
            let mut placed = [0; 16];
            PLACES.iter().zip(sixteen).for_each(|(&place, &number)| placed[place] = number ^ turned);
            self.numbers.extend(placed);
        }
    }
}

/// Row by row, each part's.
fn turns<P>(n: usize, parts: &[P]) -> impl Iterator<Item = (usize, &P)> {
    (0..n).flat_map(move |row| parts.iter().map(move |part| (row, part)))
}
