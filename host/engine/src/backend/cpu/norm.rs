//! Root-mean-square norm and rotary positions, on panel-major activations `[width / 16][stride(rows)][16]`.

use super::isa::{Isa, Kernel, LANES, Lanes, Simd, stride};
use crate::spec::ModelSpec;

/// Writes `x / rms(x) * weight`, row by row.
pub(super) fn rms_norm(isa: Isa, norm: &Norm, x: &[Lanes], rows: usize, out: &mut [Lanes]) {
    isa.run(RmsNorm { norm, x, rows, out });
}

/// Gains of a norm.
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) gain: Vec<Lanes>,
    pub(super) eps: f32,
}

struct RmsNorm<'a> {
    norm: &'a Norm,
    x: &'a [Lanes],
    rows: usize,
    out: &'a mut [Lanes],
}

impl Kernel for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm: Norm { gain, eps }, x, rows, out } = self;
        let width = (gain.len() * LANES) as f32;
        let step = stride(rows);
        for row in 0..rows {
            let mut squares = s.zero();
            for panel in 0..gain.len() {
                let v = s.load(&x[panel * step + row]);
                squares = s.fma(v, v, squares);
            }
            let scale = s.splat(1.0 / (s.sum(squares) / width + eps).sqrt());
            for (panel, gain) in gain.iter().enumerate() {
                let v = s.mul(s.load(&x[panel * step + row]), scale);
                s.store(s.mul(v, s.load(gain)), &mut out[panel * step + row]);
            }
        }
    }
}

/// Cosines and sines by position, for the first half of a head: `[position][head_dim / 32][16]`.
///
/// Made once in `f64` from the platform's sine and cosine and rounded to `f32`: another machine's libm may differ in the
/// last bit of the `f64`, which survives that rounding about once in 2^28 values.
#[derive(Debug)]
pub(super) struct Rope {
    cos: Vec<Lanes>,
    sin: Vec<Lanes>,
    half: usize,
}

impl Rope {
    pub(super) fn tables(spec: &ModelSpec, positions: usize) -> Self {
        let half = spec.head_dim / 2 / LANES;
        let angle = |i: usize| {
            let (position, d) = (i / (half * LANES), i % (half * LANES));
            position as f64 * spec.rope_theta.powf(-2.0 * d as f64 / spec.head_dim as f64)
        };
        let table = |f: fn(f64) -> f64| {
            (0..positions * half).map(|v| std::array::from_fn(|i| f(angle(v * LANES + i)) as f32)).collect()
        };
        Self { cos: table(f64::cos), sin: table(f64::sin), half }
    }

    pub(super) fn bytes(&self) -> usize {
        2 * size_of_val(self.cos.as_slice())
    }

    /// Rotates the heads in `x`, whose rows stand at `positions`.
    pub(super) fn rotate(&self, isa: Isa, x: &mut [Lanes], positions: &[u32]) {
        isa.run(Rotate { rope: self, x, positions });
    }
}

struct Rotate<'a> {
    rope: &'a Rope,
    x: &'a mut [Lanes],
    positions: &'a [u32],
}

impl Kernel for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (step, half) = (stride(self.positions.len()), self.rope.half);
        for head in self.x.chunks_exact_mut(2 * half * step) {
            let (low, high) = head.split_at_mut(half * step);
            for (row, &position) in self.positions.iter().enumerate() {
                for panel in 0..half {
                    let table = position as usize * half + panel;
                    let (cos, sin) = (s.load(&self.rope.cos[table]), s.load(&self.rope.sin[table]));
                    let at = panel * step + row;
                    let (a, b) = (s.load(&low[at]), s.load(&high[at]));
                    let minus_sin = s.sub(s.zero(), sin);
                    s.store(s.fma(b, minus_sin, s.mul(a, cos)), &mut low[at]);
                    s.store(s.fma(a, sin, s.mul(b, cos)), &mut high[at]);
                }
            }
        }
    }
}
