//! Root-mean-square norm and rotary positions, on panel-major activations `[width / 16][stride(rows)][16]`.

use super::isa::{Isa, Kernel, LANES, Lanes, Simd, stride};
use crate::spec::Rope;

/// Writes `x / rms(x) * gain`, row by row.
pub(super) fn rms_norm(isa: Isa, norm: &Norm, x: &[Lanes], rows: usize, out: &mut [Lanes]) {
    isa.run(RmsNorm { norm, x, rows, out, add: false });
}

/// Adds `x / rms(x) * gain` to `out`, row by row.
pub(super) fn rms_norm_add(isa: Isa, norm: &Norm, x: &[Lanes], rows: usize, out: &mut [Lanes]) {
    isa.run(RmsNorm { norm, x, rows, out, add: true });
}

/// Norms each head in `x` in place.
pub(super) fn norm_heads(isa: Isa, norm: &Norm, x: &mut [Lanes], rows: usize) {
    isa.run(NormHeads { norm, x, rows });
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
    add: bool,
}

struct NormHeads<'a> {
    norm: &'a Norm,
    x: &'a mut [Lanes],
    rows: usize,
}

impl Norm {
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.gain.as_slice())
    }

    /// What a row is multiplied by before the gain.
    #[inline(always)]
    fn scale<S: Simd>(&self, s: S, x: &[Lanes], step: usize, row: usize) -> S::V {
        let mut squares = s.zero();
        for panel in 0..self.gain.len() {
            let v = s.load(&x[panel * step + row]);
            squares = s.fma(v, v, squares);
        }
        let width = (self.gain.len() * LANES) as f32;
        s.splat(1.0 / (s.sum(squares) / width + self.eps).sqrt())
    }
}

impl Kernel for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm, x, rows, out, add } = self;
        let step = stride(rows);
        for row in 0..rows {
            let scale = norm.scale(s, x, step, row);
            for (panel, gain) in norm.gain.iter().enumerate() {
                let at = panel * step + row;
                let v = s.mul(s.mul(s.load(&x[at]), scale), s.load(gain));
                s.store(if add { s.add(s.load(&out[at]), v) } else { v }, &mut out[at]);
            }
        }
    }
}

impl Kernel for NormHeads<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { norm, x, rows } = self;
        let step = stride(rows);
        for head in x.chunks_exact_mut(norm.gain.len() * step) {
            for row in 0..rows {
                let scale = norm.scale(s, head, step, row);
                for (panel, gain) in norm.gain.iter().enumerate() {
                    let v = s.mul(s.load(&head[panel * step + row]), scale);
                    s.store(s.mul(v, s.load(gain)), &mut head[panel * step + row]);
                }
            }
        }
    }
}

/// Cosines and sines by position, for the first half of what is turned of a head: `[position][rope width / 32][16]`.
///
/// Made once in `f64` from the platform's sine and cosine and rounded to `f32`: another machine's libm may differ in the
/// last bit of the `f64`, which survives that rounding about once in 2^28 values.
#[derive(Debug)]
pub(super) struct RopeTables {
    cos: Vec<Lanes>,
    sin: Vec<Lanes>,
    half: usize,
    /// Vectors of a head, turned or not.
    head: usize,
}

impl RopeTables {
    pub(super) fn new(rope: &Rope, head_dim: usize, positions: usize) -> Self {
        let frequencies = rope.frequencies();
        let half = frequencies.len() / LANES;
        let angle = |v: usize, i: usize| (v / half) as f64 * frequencies[v % half * LANES + i];
        let table = |f: fn(f64) -> f64| {
            (0..positions * half).map(|v| std::array::from_fn(|i| (rope.magnitude * f(angle(v, i))) as f32)).collect()
        };
        Self { cos: table(f64::cos), sin: table(f64::sin), half, head: head_dim / LANES }
    }

    pub(super) fn bytes(&self) -> usize {
        2 * size_of_val(self.cos.as_slice())
    }

    /// Turns the heads in `x`, whose rows stand at `positions`.
    pub(super) fn rotate(&self, isa: Isa, x: &mut [Lanes], positions: &[u32]) {
        isa.run(Rotate { rope: self, x, positions });
    }
}

struct Rotate<'a> {
    rope: &'a RopeTables,
    x: &'a mut [Lanes],
    positions: &'a [u32],
}

impl Kernel for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (step, half) = (stride(self.positions.len()), self.rope.half);
        for head in self.x.chunks_exact_mut(self.rope.head * step) {
            let (low, high) = head[..2 * half * step].split_at_mut(half * step);
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
