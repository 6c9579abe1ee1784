//! LayerNorm and the activation of an encoder, each with the bias of the product before it, on panel-major activations
//! `[width / 16][stride(rows)][16]`.

use super::super::isa::{Isa, Kernel, LANES, Lanes, Simd, stride};
use super::super::math;

/// A LayerNorm, and the bias that is added before it.
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) before: Option<Vec<Lanes>>,
    pub(super) gain: Vec<Lanes>,
    pub(super) bias: Vec<Lanes>,
    pub(super) eps: f32,
}

/// Adds the bias before and norms, row by row and in place.
pub(super) fn add_and_norm(isa: Isa, norm: &Norm, x: &mut [Lanes], rows: usize) {
    if let Some(before) = &norm.before {
        super::super::rows::add_bias(isa, before, x, rows);
    }
    isa.run(LayerNorm { norm, x, rows });
}

struct LayerNorm<'a> {
    norm: &'a Norm,
    x: &'a mut [Lanes],
    rows: usize,
}

/// Adds a bias to some panels and applies GELU.
pub(super) struct BiasGelu<'a> {
    pub(super) bias: &'a [Lanes],
    pub(super) x: &'a mut [Lanes],
    pub(super) rows: usize,
    pub(super) tanh: bool,
}

impl Norm {
    pub(super) fn bytes(&self) -> usize {
        let vectors = 2 + usize::from(self.before.is_some());
        vectors * size_of_val(self.gain.as_slice())
    }
}

impl Kernel for LayerNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm, x, rows } = self;
        let (step, width) = (stride(rows), (norm.gain.len() * LANES) as f32);
        for row in 0..rows {
            let mut sum = s.zero();
            for panel in 0..norm.gain.len() {
                sum = s.add(sum, s.load(&x[panel * step + row]));
            }
            let mean = s.splat(s.sum(sum) / width);
            let mut squares = s.zero();
            for panel in 0..norm.gain.len() {
                let off = s.sub(s.load(&x[panel * step + row]), mean);
                squares = s.fma(off, off, squares);
            }
            let scale = s.splat(1.0 / (s.sum(squares) / width + norm.eps).sqrt());
            for (panel, (gain, bias)) in norm.gain.iter().zip(&norm.bias).enumerate() {
                let x = &mut x[panel * step + row];
                let normed = s.mul(s.sub(s.load(x), mean), scale);
                s.store(s.fma(normed, s.load(gain), s.load(bias)), x);
            }
        }
    }
}

impl Kernel for BiasGelu<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (panel, bias) in self.x.chunks_exact_mut(stride(self.rows)).zip(self.bias) {
            let bias = s.load(bias);
            for x in &mut panel[..self.rows] {
                let sum = s.add(s.load(x), bias);
                s.store(if self.tanh { math::gelu(s, sum) } else { math::gelu_erf(s, sum) }, x);
            }
        }
    }
}
